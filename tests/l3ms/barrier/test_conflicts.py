"""Constraints that cannot hold together are named once they have been violated for long without getting better."""

import math

from l3ms.barrier.conflicts import ConflictWatch

STEPS = ConflictWatch.patience + 2  # one says which are violated, one how much, and then it counts


def update(watch, violations, steps):
    for _ in range(steps):
        watch.update(violations)


def test_the_two_worst_are_named_in_their_order_and_once(caplog):
    watch = ConflictWatch(["a", "b", "c", "d"])
    update(watch, [2.0, 1.0, -5.0, 3.0], STEPS - 1)
    assert watch.pairs == []
    update(watch, [2.0, 1.0, -5.0, 3.0], 1)
    assert watch.pairs == [("a", "d")]
    assert "'a' and 'd' look infeasible together: both violated for 100 steps without progress (2 and 3)" in caplog.text
    update(watch, [2.0, 1.0, -5.0, 3.0], 3 * STEPS)
    update(watch, [2.0, -1.0, -5.0, 3.0], STEPS)  # others violated: it counts anew, and the pair is known
    assert watch.pairs == [("a", "d")]
    assert len(caplog.records) == 1
    update(watch, [math.nan, 1.0, 4.0, -1.0], STEPS)
    assert watch.pairs == [("a", "d"), ("b", "c")]


def test_one_that_is_met_now_and_then_or_gets_better_is_not_named():
    watch = ConflictWatch(["a", "b"])
    for step in range(5 * STEPS):
        watch.update([1.0, -0.1 if step % 90 == 0 else 1.0])
        assert watch.pairs == []
    for step in range(5 * STEPS):
        watch.update([1.0 * 0.995**step, 0.5])  # 1% in two or three steps
    assert watch.pairs == [("a", "b")]  # only when the other became the worst, and rests
    watch = ConflictWatch(["a", "b"])
    for step in range(STEPS):
        watch.update([1.0 - 0.00005 * step, 0.5])  # half a percent in all that time
    assert watch.pairs == [("a", "b")]


def test_the_worse_of_the_two_says_whether_there_is_progress():
    improving, resting = ConflictWatch(["a", "b"]), ConflictWatch(["a", "b"])
    for step in range(2 * STEPS):
        improving.update([1000 * 0.98**step, 0.5])
        resting.update([2.0, 0.98**step])
    assert improving.pairs == []
    assert resting.pairs == [("a", "b")]


def test_it_goes_on_from_its_state():
    first, second = ConflictWatch(["a", "b"]), ConflictWatch(["a", "b"])
    update(first, [1.0, 1.0], STEPS - 10)
    second.load_state_dict(first.state_dict())
    update(second, [1.0, 1.0], 9)
    assert second.pairs == []
    update(second, [1.0, 1.0], 1)
    assert second.pairs == [("a", "b")]
