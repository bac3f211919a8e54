"""What `l3ms check` reckons of a run: rates of sampling, lengths to come, and the sum of it, by a clock that the test moves."""

import pytest

import l3ms
from l3ms.config.run_config import RunConfig
from l3ms.training import constraint_step
from l3ms.training.phases import HostMarks, Phases
from l3ms.verdicts import costs
from l3ms.verdicts.costs import Sampled, batches, expected_lengths, sampling_rates, with_tail

STEP, TOKEN = 0.25, 0.0625  # seconds


def sampled(*lengths):
    return Sampled(list(lengths), STEP * max(lengths) + TOKEN * sum(lengths))


def test_rates_are_those_that_made_the_seconds():
    found = sampling_rates([sampled(3, 9, 5), sampled(4, 4), sampled(1, 30, 2, 2)])
    assert found == pytest.approx((STEP, TOKEN))
    assert found.of([[8, 2]]) == pytest.approx(8 * STEP + 10 * TOKEN)


def test_rates_are_not_negative_where_a_token_costs_nothing():
    """More rows took less time, by noise."""
    step, token = sampling_rates([Sampled([10, 1], 1.0), Sampled([10, 10], 0.9), Sampled([20, 20], 1.9)])
    assert token == 0
    assert step == pytest.approx(0.095, rel=0.1)


def rows(*lengths, prompt=2):
    return [{"labels": [-100] * prompt + [5] * length, "input_ids": [5] * (prompt + length)} for length in lengths]


@pytest.mark.parametrize(
    ("constraints", "lengths"),
    [
        ([], [4, 8, 12]),
        ([l3ms.Length(max=6)], [3, 6, 9]),
        ([l3ms.Length(10, 20)], [5, 10, 14]),  # as many as there may be
        ([l3ms.Length(6, 9)], [4, 8, 12]),
        ([l3ms.Length(monitor=True)], [4, 8, 12]),
        ([l3ms.Length(quantile=0.9, max=3)], [4, 8, 12]),  # is no mean
    ],
)
def test_lengths_become_those_of_the_data_within_the_bounds(constraints, lengths):
    assert expected_lengths(rows(4, 8, 12), constraints, 14) == lengths


def test_batches_are_of_the_lengths_and_the_same_again():
    found = batches([3, 5], 4, count=10)
    assert found == batches([3, 5], 4, count=10)
    assert {length for batch in found for length in batch} == {3, 5}
    assert [len(batch) for batch in found] == [4] * 10


def test_a_tail_keeps_the_mean_and_makes_the_longest_longer():
    found = with_tail([10] * 1000, 200)
    assert found[:1000] == [10] * 1000
    assert sum(found) / 2000 == pytest.approx(10, rel=0.02)
    assert max(found) > 60
    assert max(with_tail([10] * 1000, 30)) == 30
    assert min(found) == 1


def at(lengths, size):
    """Seconds of sampling a batch, in the mean."""
    found = batches(lengths, size)
    return sum(STEP * max(batch) + TOKEN * sum(batch) for batch in found) / len(found)


def test_the_reckoning(train, make_model, tmp_path, monkeypatch):
    """Sampling takes what the rates say, the task 2 seconds, steps 1 each; of responses that must become shorter."""
    now = [0.0]
    rollout = constraint_step.rollout

    def sampling(*args, **kwargs):
        found = rollout(*args, **kwargs)
        now[0] += sampled(*found.host_lengths).seconds
        return found

    monkeypatch.setattr(constraint_step, "rollout", sampling)
    trainer, _ = train(
        make_model(gain=0.3), start=False, constraints=[l3ms.Length(max=2)], max_steps=1 + costs.ITERATIONS
    )
    trainer.phases = Phases(marks=HostMarks(lambda: now[0]))
    trainer.create_optimizer()
    task, step = trainer.compute_loss, trainer.optimizer.step

    def spent(seconds, function):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(trainer, "compute_loss", spent(2, task))
    monkeypatch.setattr(trainer.optimizer, "step", spent(1, step))
    values = {
        "model": "m", "output": "o", "data": {"train": "t.jsonl"}, "constraints": [{"type": "length", "max": 2}], "watch": None,
        "train": {"iterations": 90, "constraint_batch_size": 6, "max_new_tokens": 16, "save_steps": 30},
        "evaluate": {"samples": 20, "batch_size": 10, "initial": False},
    }  # fmt: skip
    data = rows(4, 4, 4)
    evaluated = sampled(*range(1, 11))
    cost = costs.measure(
        RunConfig.model_validate(values), trainer, data, loading=3.0, evaluated=evaluated, response=evaluated.seconds / 10 + 0.5,
        folder=tmp_path,
    )  # fmt: skip
    lengths = with_tail([2, 2, 2], 16)
    assert cost.tokens == sum(lengths) / 6
    settled = 2 + 2 + at(lengths, 6)
    assert cost.settled == pytest.approx(settled, rel=1e-3)
    assert cost.phases["task"] == 2
    assert cost.iteration == pytest.approx(4 + cost.phases["sampling"])
    assert cost.training == pytest.approx(90 * (settled + (cost.iteration - settled) / 6), rel=0.02)
    assert cost.training_as_now == pytest.approx(90 * cost.iteration, rel=0.02)
    assert cost.evaluation == pytest.approx(2 * 20 * (at(lengths, 10) / 10 + 0.5), rel=1e-3)
    assert cost.saving > 0
    assert cost.loading == 3
