"""`Watch` in whole runs on tiny models: planted hacking trips, a healthy run is the run it would have been, stop and rollback."""

import types
from typing import Any

import pytest
import torch
from hacked import HACKED, MANY_FIVES, NEVER_ENDS, fives
from training_runs import rows, run
from transformers import TrainerCallback

import l3ms
from l3ms.config.watch import WatchConfig


class Weights(TrainerCallback):
    """Those after each iteration, with the learning rate of the next: as they are when the watch has acted."""

    def __init__(self, trainer):
        self.trainer, self.after, self.rates = trainer, {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = [p.detach().clone() for p in self.trainer.model.parameters()]
        self.rates[state.global_step] = self.trainer.optimizer.param_groups[0]["lr"]


@pytest.fixture
def watched(tmp_path, tokenizer, make_model):
    """watched(watch, constraints, **options) -> a trainer that ran under it, and its weights after each iteration."""

    def make(watch, constraints, *, gain=0.3, **options):
        model = make_model(gain=gain)
        trainer, _ = run(tmp_path, tokenizer, model, constraints=constraints, start=False, **options)
        kept = Weights(trainer)
        if watch is not None:
            trainer.add_callback(watch)
        trainer.add_callback(kept)
        trainer.train()
        return trainer, kept

    return make


def logged(trainer, key):
    return {row["step"]: row[key] for row in trainer.state.log_history if key in row}


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# ---- what trips ----


@pytest.mark.parametrize(
    ("constraint", "rule", "steps"), [(MANY_FIVES, "distinct-2 fell", 14), (NEVER_ENDS, "EOS rate fell", 8)]
)
def test_planted_hacking_trips_and_warns_once_per_rule(watched, caplog, constraint, rule, steps):
    watch = l3ms.Watch(window=4)
    trainer, _ = watched(watch, [constraint], max_steps=steps, **HACKED)
    assert trainer.state.global_step == steps, "a warning ended the run"
    found = [item["rule"] for item in watch.tripped]
    assert rule in found
    assert len(found) == len(set(found)) == sum("training goes on" in line for line in caplog.messages)
    tripped = next(item for item in watch.tripped if item["rule"] == rule)
    statistic = logged(trainer, {"distinct-2 fell": "watch/distinct_2", "EOS rate fell": "watch/ended"}[rule])
    i = tripped["iteration"]
    assert tripped["value"] == pytest.approx(sum(statistic[j] for j in range(i - 3, i + 1)) / 4)
    assert tripped["limit"] == pytest.approx(0.5 * sum(statistic[j] for j in range(1, 5)) / 4)
    assert tripped["action"] == "warn"
    assert any(
        f"iteration {i}: {rule} is {tripped['value']:.3g}, beyond {tripped['limit']:.3g}" in m for m in caplog.messages
    )


def test_a_healthy_run_trips_nothing_and_is_the_run_it_would_have_been(watched):
    """Dropout, held-out samples and gradients included: the watch draws no random number of the run's."""
    options = {**HACKED, "max_grad_norm": 1.0, "max_steps": 12, "learning_rate": 0.002}
    watch = l3ms.Watch(held_out=rows(10, seed=3), held_out_every=4, held_out_samples=8, every=3, window=4)
    constraints = [l3ms.Length(min=2, max=9), l3ms.Constraint("fives", fives, max=3.0)]
    trainer, kept = watched(watch, constraints, **options)
    assert watch.tripped == []
    assert watch.conflicts == []
    _, unwatched = watched(None, constraints, **options)
    assert same(kept.after[12], unwatched.after[12])
    every = ("ended", "truncated", "duplicates", "distinct_1", "distinct_2", "length/p5", "length/p50", "length/p95")
    for name in every:
        assert list(logged(trainer, f"watch/{name}")) == list(range(1, 13))
    assert list(logged(trainer, "watch/held_out/length")) == [4, 8, 12]
    assert list(logged(trainer, "watch/held_out_gap/fives")) == [4, 8, 12]
    assert set(logged(trainer, "watch/cosine/length/fives")) <= {3, 6, 9, 12}


def test_rewards_hacked_by_way_of_the_training_prompts_trip_on_held_out_ones(watched):
    """The reward knows the training prompts: what it says of held-out ones is worse."""

    def memorised(prompts, completions, **kwargs):
        return [float(not prompt.startswith("held")) + 0.01 * i for i, prompt in enumerate(prompts)]

    held_out = [{**row, "prompt": f"held {i}"} for i, row in enumerate(rows(12, seed=4))]
    watch = l3ms.Watch(held_out=held_out, held_out_every=2, held_out_samples=12, every=0)
    watched(watch, [l3ms.Constraint("memorised", memorised, min=0.5)], max_steps=4)
    assert [(item["rule"], item["iteration"]) for item in watch.tripped] == [("held-out memorised", 4)]


@pytest.mark.parametrize(
    ("rows_of_all", "samples", "shares"), [(1, 64, [0, 0]), (9, 2, [1, 1]), (9, 64, [5, 4]), (0, 64, [0, 0])]
)
def test_held_out_rows_are_shared_by_ranks_or_left_by_all_of_them(rows_of_all, samples, shares):
    """A rank without a row would not take part, and the others would wait for it."""
    taken = []
    for rank in range(2):
        watch = l3ms.Watch(held_out=rows(rows_of_all), held_out_samples=samples)
        args = types.SimpleNamespace(seed=0, process_index=rank, world_size=2)
        watch.trainer, watch._ranks = types.SimpleNamespace(args=args), 2  # type: ignore[assignment]
        taken.append(watch._held_out_rows())
    assert [len(part) for part in taken] == shares
    assert len({row["prompt"] for part in taken for row in part}) == sum(shares)


def test_without_constraints_or_responses_there_is_nothing_to_watch(watched):
    watch = l3ms.Watch(on_trip="rollback")
    trainer, _ = watched(watch, (), solver="none")
    assert watch.tripped == []
    assert not any(key.startswith("watch/") for row in trainer.state.log_history for key in row)


# ---- what follows ----


def test_stop_ends_the_run_at_the_trip(watched, caplog):
    watch = l3ms.Watch(on_trip="stop", window=4, every=0)
    trainer, kept = watched(watch, [NEVER_ENDS], max_steps=30, **HACKED)
    end = trainer.state.global_step
    assert end < 30
    assert {item["iteration"] for item in watch.tripped} == {end}
    assert {item["action"] for item in watch.tripped} == {"stop"}
    assert max(kept.after) == end == max(logged(trainer, "watch/ended")), "the last iteration was not logged"
    assert "training stops" in caplog.text


def test_rollback_restores_the_snapshot_halves_the_rate_and_goes_on_at_most_so_often(watched, caplog):
    watch = l3ms.Watch(on_trip="rollback", window=4, snapshot_every=4, max_rollbacks=1, every=0)
    trainer, kept = watched(watch, [NEVER_ENDS], max_steps=40, average_fraction=1.0, **HACKED)
    start = [
        p.detach()
        for p in watched(None, [NEVER_ENDS], max_steps=1, **{**HACKED, "learning_rate": 0.0})[0].model.parameters()
    ]
    by_iteration = {item["iteration"]: item for item in watch.tripped}
    first, last = sorted(by_iteration)
    for trip in (first, last):
        restored = by_iteration[trip]["restored"]
        assert restored <= trip - 4
        assert restored % 4 == 0
        assert same(kept.after[trip], kept.after[restored] if restored else start)
        assert not same(kept.after[trip], kept.after[trip - 1])
    assert (by_iteration[first]["action"], by_iteration[last]["action"]) == ("rollback", "stop")
    assert watch.rollbacks == 1
    assert trainer.state.global_step == last < 40
    assert last >= first + 4, "tripped again before a whole window was new"
    assert kept.rates[first - 1] == 0.02
    assert kept.rates[first] == kept.rates[last] == 0.01
    assert trainer.l3m_optimizer.constraint_steps == last  # of the run, not of the snapshot
    # averaged: the iterations up to the snapshot, and those that followed the rollback up to the last snapshot
    restored = by_iteration[last]["restored"]
    counted = restored if restored < first else by_iteration[first]["restored"] + restored - first
    assert (0 if trainer.average is None else trainer.average.n_averaged) == counted
    assert logged(trainer, "watch/rollbacks")[first] == 1
    assert set(logged(trainer, "constraints/open/estimate")) == set(range(1, last + 1))
    assert f"back to iteration {by_iteration[first]['restored']}, with half the learning rate" in caplog.text
    assert "training stops after 1 rollbacks" in caplog.text


@pytest.mark.parametrize(
    ("looks", "before"),
    [
        ([(1, None), (5, None), (9, None), (13, None)], 4),  # an iteration in four samples
        ([(1, None), (2, 0.0), (3, None), (4, 9.0)], 1),
        ([(1, None), (2, 9.0), (3, None), (4, 9.0), (5, None), (6, 9.0)], 1),  # held-out prompts, since iteration 2
    ],
)
def test_a_rollback_is_to_before_all_that_the_rules_look_at(looks, before, monkeypatch):
    watch = l3ms.Watch(on_trip="rollback", window=3, held_out_every=2, snapshot_every=3, every=0)
    trainer: Any = types.SimpleNamespace(
        args=types.SimpleNamespace(world_size=1, seed=0, process_index=0), sharded=False, constraints=[l3ms.Length(max=9)],
        l3m_optimizer=object(), sampled=True, last_rollout=object(), last_rewards={}, watched={},
        state=types.SimpleNamespace(global_step=0),
    )  # fmt: skip
    monkeypatch.setattr("l3ms.watching.snapshots.Snapshot.of", lambda trainer: types.SimpleNamespace(iteration=0))
    monkeypatch.setattr("l3ms.watching.watch.response_tokens", lambda rollout: [])
    monkeypatch.setattr("l3ms.watching.watch.response_statistics", lambda responses, floor: {"length/spread": 9.0})
    watch.begin(trainer)
    watch._rows = [{}]
    for iteration, gap in looks:
        trainer.state.global_step = iteration
        monkeypatch.setattr(
            watch, "_look_at_held_out", lambda *_, gap=gap: watch._held_out.update({"length": gap}) and []
        )
        watch.on_step_end(trainer.args, trainer.state, None)
    assert watch._before == before


# ---- conflicts ----


def test_an_infeasible_pair_is_named_and_the_run_goes_on_to_the_least_violation(watched, caplog):
    watch = l3ms.Watch(every=4)
    short, long = l3ms.Length(max=4, scale=6, name="short"), l3ms.Length(min=8, scale=6, name="long")
    trainer, _ = watched(
        watch, [short, long, l3ms.Constraint("fives", fives, max=9.0)], max_steps=20, smoothing="ema", **HACKED
    )
    assert trainer.state.global_step == 20
    assert [item["pair"] for item in watch.conflicts] == [["short", "long"]]
    assert watch.conflicts[0]["cosine"] == pytest.approx(-1.0)
    assert (
        "constraints 'short' and 'long' pull against each other (cosine -1.00 +- 0.00) and both are violated"
        in caplog.text
    )
    assert set(logged(trainer, "watch/cosine/short/long").values()) == {-1.0}
    lengths = list(logged(trainer, "constraints/short/estimate").values())
    assert 4.3 < lengths[-1] < 7.7


def test_a_pair_with_one_bound_met_is_not_named(watched):
    watch = l3ms.Watch(every=2)
    watched(watch, [l3ms.Length(max=14, name="short"), l3ms.Length(min=12, name="long")], max_steps=8)
    assert watch.conflicts == []


# ---- options ----


@pytest.mark.parametrize("row", [{"prompt": "red"}, {"input_ids": [1], "labels": [1]}, "red"])
def test_held_out_rows_that_are_none_are_refused_where_the_training_begins(row, watched):
    with pytest.raises(ValueError, match=r"Watch: held_out\[0\] must be a row as an L3MTrainer's, with .*; it has no"):
        watched(l3ms.Watch(held_out=[row]), [l3ms.Length(max=9)])


def test_options_may_be_a_dict():
    assert l3ms.Watch({"on_trip": "stop"}, window=3).config == WatchConfig(on_trip="stop", window=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_trip": "panic"}, ["on_trip", "'warn', 'stop' or 'rollback'", "'panic'"]),
        ({"window": 1}, ["window", "greater than or equal to 2", "1"]),
        ({"ended_fall": 1.5}, ["ended_fall", "less than 1"]),
        ({"on_tripp": "warn"}, ["on_tripp", "did you mean on_trip?"]),
        ({"on_trip": "rollback", "snapshot_every": 5}, ["snapshot_every: must be at least window (10)", "got 5"]),
        ({"held_out_samples": "many"}, ["held_out_samples", "'many'"]),
    ],
)
def test_wrong_options_are_one_line_naming_the_field(options, words):
    for config in (None, WatchConfig()):
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
            l3ms.Watch(config, **options)
        assert all(word in str(error.value) for word in words), str(error.value)


def test_options_add_to_a_configuration():
    assert l3ms.Watch(WatchConfig(window=20, every=3), every=5).config == WatchConfig(window=20, every=5)
