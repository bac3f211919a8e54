"""The order of the rollouts' prompts; whole runs that are resumed are in `test_trainer_runs.py`."""

import pytest

from l3ms.model.orders import PromptOrder

ROWS = [{"prompt": n} for n in range(7)]


def order(rank=0, world=1, seed=3, rows=ROWS):
    return PromptOrder(rows, seed=seed, rank=rank, world=world)


def test_every_row_once_before_any_twice_in_another_order_each_time():
    taken = [row["prompt"] for row in order().take(21)]
    rounds = [taken[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 3
    assert taken != [row["prompt"] for row in order(seed=4).take(21)]


def test_a_rank_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="1 rows cannot be shared by 2 processes"):
        order(1, 2, rows=ROWS[:1])


def test_ranks_share_a_round():
    found = [order(rank, 3).take(count) for rank, count in ((0, 3), (1, 2), (2, 2))]
    assert sorted(row["prompt"] for rows in found for row in rows) == list(range(7))


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 15])
def test_it_goes_on_from_where_it_was(taken):
    first, second = order(1, 2), order(1, 2)
    first.take(taken)
    second.take(5)  # its own past is forgotten
    second.restore(first.state())
    assert second.take(9) == first.take(9)
    assert second.taken == taken + 9


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 4}, "in another order"),
        ({"world": 2}, "begin in a new order"),
        ({"rows": ROWS[:6]}, "in another order"),
    ],
)
def test_another_order_begins_anew(other, said, caplog):
    first = order(**other)
    first.take(4)
    second = order()
    second.restore(first.state())
    assert said in caplog.text
    assert second.take(4) == order().take(4)
