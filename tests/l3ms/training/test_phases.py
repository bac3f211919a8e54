"""The clock of an iteration: what counts to which phase, by a clock that the test moves; that phases add up; and what the log says."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from training_runs import rows

import l3ms
from l3ms.training import checkpoints, constraint_step
from l3ms.training.phase_summary import PHASES, in_words, summary
from l3ms.training.phases import HostMarks, Phases, peak_memory

NAMES = {*(f"time/{name}" for name in PHASES), "time/iteration", "time/sampled_tokens_per_second", "memory/peak_mib"}


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self):
        return self.now

    def around(self, seconds, function):
        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow


def fail(clock, seconds):
    clock.now += seconds
    raise ZeroDivisionError


@pytest.fixture
def clock():
    return Clock()


def test_a_phase_within_another_interrupts_it(clock):
    phases = Phases(marks=HostMarks(clock))
    phases.begin()
    clock.now += 1
    with phases.inside("constraint"):
        clock.now += 2
        with phases.inside("sampling"):
            clock.now += 4
        phases.sampled(12)
        clock.now += 8
        with pytest.raises(ZeroDivisionError), phases.inside("rewards"):
            fail(clock, 16)
    clock.now += 32
    phases.iterate()
    line = phases.line()
    found = {name: line[f"time/{name}"] for name in (*PHASES, "iteration")}
    assert found == {
        "task": 0, "sampling": 4, "rewards": 16, "constraint": 10, "optimizer": 0, "evaluation": 0, "saving": 0, "other": 33,
        "iteration": 63,
    }  # fmt: skip
    assert line["time/sampled_tokens_per_second"] == 3


def test_a_line_is_the_mean_of_the_iterations_since_the_last_one(clock):
    phases = Phases(marks=HostMarks(clock))
    phases.begin()
    for seconds in (1, 2, 6):
        with phases.inside("task"):
            clock.now += seconds
        phases.iterate()
    with phases.inside("saving"):
        clock.now += 100  # of the iteration that has begun
    assert phases.line()["time/task"] == 3
    assert phases.line() == {}
    phases.iterate()
    line = phases.line()
    assert (line["time/saving"], line["time/task"], line["time/iteration"]) == (100, 0, 100)
    assert "time/sampled_tokens_per_second" not in line


def test_outside_of_a_training_nothing_is_timed(clock):
    phases = Phases(marks=HostMarks(clock))
    with phases.inside("task"):
        clock.now += 1
    phases.iterate()
    assert phases.line() == {}
    phases.begin()
    phases.iterate()
    phases.stop()
    assert phases.line() == {}


@dataclass
class Stream:
    """A device behind its host: a mark has a time only when the host has waited for it. To ask earlier is an error, as of an event."""

    clock: Clock
    reached: set = field(default_factory=set)
    times: list = field(default_factory=list)

    def mark(self):
        self.times.append(self.clock.now)
        return len(self.times) - 1

    def passed(self, mark):
        return mark in self.reached

    def seconds(self, begin, end):
        assert {begin, end} <= self.reached
        return self.times[end] - self.times[begin]

    def wait(self):
        self.reached = set(range(len(self.times)))


def test_events_are_read_when_they_have_passed_and_never_waited_for(clock):
    stream = Stream(clock)
    phases = Phases(marks=stream)
    phases.begin()
    for seconds in (3, 5):
        with phases.inside("task"):
            clock.now += seconds
        phases.iterate()
        assert phases.line() == {}
    stream.wait()
    with phases.inside("task"):
        clock.now += 100
    phases.iterate()  # reads the two before, and keeps its own for later
    assert phases.line()["time/task"] == 4
    stream.wait()
    assert phases.line()["time/task"] == 100


def timed(train, monkeypatch, clock, make_model, **options):
    """A training in which known things take known seconds, and nothing else takes any. -> its trainer"""

    async def numbered(completions, **columns):
        clock.now += 5
        return [float(len(text) % 3) for text in completions]

    constraints = [l3ms.Length(max=6), l3ms.Constraint("numbered", numbered, max=1.5)]
    trainer, _ = train(make_model(), start=False, constraints=constraints, gradient_accumulation_steps=2, **options)
    trainer.phases = Phases(marks=HostMarks(clock))
    trainer.create_optimizer()
    monkeypatch.setattr(constraint_step, "rollout", clock.around(3, constraint_step.rollout))
    monkeypatch.setattr(checkpoints, "seal", clock.around(7, checkpoints.seal))
    monkeypatch.setattr(trainer, "compute_loss", clock.around(2, trainer.compute_loss))
    monkeypatch.setattr(trainer.accelerator, "backward", clock.around(0.5, trainer.accelerator.backward))
    monkeypatch.setattr(trainer.optimizer, "step", clock.around(1, trainer.optimizer.step))
    collate = trainer.data_collator
    monkeypatch.setattr(trainer, "data_collator", clock.around(0.25, collate))
    return trainer


def lines(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("half_steps", ["alternating", "joint"])
def test_what_counts_to_which_phase(train, monkeypatch, clock, make_model, half_steps):
    """Two micro-batches of 4 of the task, 6 responses in parts of 4 and 2, two steps or a joint one; a checkpoint after every second."""
    options = {"half_steps": half_steps, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = timed(train, monkeypatch, clock, make_model, **options)
    monkeypatch.setattr(constraint_step, "_counted", lambda trainer, weights: list(range(len(weights))))
    trainer.train()
    found = lines(trainer)
    assert all(set(line) | {"time/sampled_tokens_per_second"} >= NAMES for line in found)
    for number, line in enumerate(found, 1):
        by_phase = {name: line[f"time/{name}"] for name in PHASES}
        assert by_phase == {
            "task": 2 * (2 + 0.5), "sampling": 3, "rewards": 5, "constraint": 2 * 0.5, "optimizer": 2 if half_steps == "alternating" else 1,
            "evaluation": 0, "saving": 7 if number == 3 else 0, "other": by_phase["other"],
        }  # fmt: skip
        assert line["time/iteration"] == sum(by_phase.values())
    assert (
        sum(line["time/iteration"] for line in found) + 7 == clock.now
    )  # the last checkpoint comes after the last line
    taken = sum(line["time/other"] for line in found) / 0.25
    assert taken == math.ceil(taken) >= 2 * 4  # batches, which are drawn one ahead


def test_sampled_tokens_per_second(train, monkeypatch, clock, make_model):
    trainer = timed(train, monkeypatch, clock, make_model, max_steps=1)
    trainer.train()
    [line] = lines(trainer)
    assert line["time/sampled_tokens_per_second"] == int(trainer.last_rollout.lengths.sum()) / 3


def test_plain_fine_tuning_has_the_same_names(train, make_model):
    trainer, _ = train(make_model(), solver="none", max_steps=2)
    for line in lines(trainer):
        assert {key for key in line if key.startswith(("time/", "memory/"))} == NAMES - {
            "time/sampled_tokens_per_second"
        }
        assert line["time/sampling"] == line["time/constraint"] == 0
        assert 0 < line["time/task"] < line["time/iteration"]


def test_an_evaluation_in_the_midst_is_its_own_phase(train, monkeypatch, clock, make_model):
    trainer = timed(
        train, monkeypatch, clock, make_model, max_steps=2, held_out=rows(8), eval_strategy="steps", eval_steps=1
    )
    monkeypatch.setattr(trainer, "prediction_step", clock.around(11, trainer.prediction_step))
    trainer.train()
    first, second = lines(trainer)
    assert (first["time/evaluation"], second["time/evaluation"] >= 11) == (0, True)


def test_a_resumed_training_has_the_lines_of_before_and_times_its_own(train, tmp_path, make_model, clock, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = timed(train, monkeypatch, clock, make_model, **options)
    first.train()
    monkeypatch.undo()
    again = timed(train, monkeypatch, clock, make_model, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(lines(again)) == 4
    assert [line["time/saving"] for line in lines(again)] == [
        0,
        0,
        0,
        0,
    ]  # what it saved after its last line is in none
    kept = [{key: line[key] for key in line if key.startswith("time/")} for line in lines(again)[:2]]
    assert kept == [{key: line[key] for key in line if key.startswith("time/")} for line in lines(first)[:2]]
    assert all(set(line) >= NAMES for line in lines(again)[2:])


def test_medians_and_shares_of_a_log():
    log = [
        {"loss": 1.0},  # of an earlier version
        *(
            {"time/iteration": 10.0 + extra, "time/sampling": 6.0, "time/task": 4.0, "time/saving": extra,
             "time/sampled_tokens_per_second": 100.0 + extra, "memory/peak_mib": 50.0 + extra}
            for extra in (0.0, 0.0, 10.0)
        ),
        {"train_runtime": 1.0},
    ]  # fmt: skip
    found = summary(log)
    assert found is not None
    assert (found["iteration"], found["sampled_tokens_per_second"], found["peak_memory_mib"]) == (10, 100, 60)
    assert list(found["phases"]) == list(PHASES)
    assert found["phases"]["sampling"] == {"seconds": 6, "share": 18 / 40}
    assert found["phases"]["saving"] == {"seconds": 0, "share": 10 / 40}
    assert sum(item["share"] for item in found["phases"].values()) == pytest.approx(1)
    assert summary(log[:1]) is None
    assert (
        in_words(found)
        == "10 s per iteration: sampling 45%, task 30%, saving 25%; 100 tokens sampled per second; at most 60 MiB"
    )


def test_the_peak_of_a_process_that_holds_a_block_is_no_less_than_the_block():
    block = torch.ones(64 << 18)  # 64 MiB
    peak = peak_memory(torch.device("cpu"))
    assert peak is None or peak > block.nbytes
