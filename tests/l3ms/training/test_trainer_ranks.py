"""The trainer and its watch on two processes, started as torchrun starts them: both act alike and end with the same weights."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import rank_forks
import torch
import trainer_ranks
from training_runs import timeless
from transformers import AutoModelForCausalLM

from l3ms.training import checkpoints


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer, make_model):
    """start(run, ...) -> what each rank found in each of the runs, which two processes take one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer.save_pretrained(folder / "model")
    make_model(gain=0.3, num_hidden_layers=2).save_pretrained(folder / "model")
    return functools.partial(started, folder)


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """One start of two processes for all of the default tests: a watch that rolls back, a run with checkpoints, and one that goes on from
    the first of them."""
    places = [str(tmp_path_factory.mktemp("run")) for _ in range(3)]
    short = {"on_trip": "warn", "steps": 6, "save_steps": 3}
    options = [
        {"on_trip": "rollback", "place": places[0]},
        {"place": places[1], **short},
        {"place": places[2], **short, "after": (places[1], 3)},
    ]
    found = start(*options)
    return dict(zip(("rollback", "whole", "resumed"), found, strict=True)), Path(places[1])


def started(folder, *runs):
    rank_forks.start("trainer_ranks", 2, folder / "model", folder, json.dumps(runs), seconds=120)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return list(zip(*ranks, strict=True))


def assert_alike(first, second, on_trip):
    assert first["completions"] != second["completions"], "each samples responses of its own"
    for ours, theirs in zip(first["final"], second["final"], strict=True):
        assert torch.equal(ours, theirs)
    assert first["tripped"] == second["tripped"] != []
    assert {item["action"] for item in first["tripped"]} >= {on_trip}
    assert first["step"] == second["step"]
    assert (first["step"] < trainer_ranks.STEPS) == (on_trip != "warn")
    watched = {key for row in first["log"] for key in row if key.startswith("watch/")}
    assert {"watch/ended", "watch/held_out/length"} <= watched
    assert "watch/cosine/open/length" in watched or on_trip == "stop"  # which ends before there are two evaluations


def test_both_ranks_see_the_same_and_act_alike(runs):
    first, second = runs[0]["rollback"]
    assert_alike(first, second, "rollback")


@pytest.mark.slow
@pytest.mark.parametrize("on_trip", ["warn", "stop"])
def test_both_ranks_see_the_same_whatever_a_watch_does(start, tmp_path, on_trip):
    [(first, second)] = start({"on_trip": on_trip, "place": str(tmp_path)})
    assert_alike(first, second, on_trip)


def assert_gone_on(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["taken"], theirs["taken"]) == (3, 6)
        for key in ("final", "average"):
            assert all(torch.equal(a, b) for a, b in zip(ours[key], theirs[key], strict=True))
        assert ours["tripped"] == theirs["tripped"]
        # What a rank logs is of its own responses in part, and the checkpoint has the first one's
        logs = [timeless(row for row in run["log"] if "loss" in row and row["step"] > 3) for run in (ours, theirs)]
        assert len(logs[0]) == 3
        assert logs[0] == logs[1]


def test_both_ranks_go_on_from_a_checkpoint(runs):
    """Resumed in the middle, each rank ends with the bits of the run that was not interrupted."""
    found, place = runs
    assert [path.name for path in checkpoints.checkpoints(place)] == ["checkpoint-6", "checkpoint-3"]
    assert {path.name for path in (place / "checkpoint-3").iterdir()} >= {
        "random_0.json", "random_1.json", "watch_0.json", "watch_1.json", "manifest.json",
    }  # fmt: skip
    assert_gone_on(found["resumed"], found["whole"])


@pytest.mark.slow
def test_other_processes_go_on_from_a_checkpoint(start, tmp_path):
    run = {"on_trip": "warn", "steps": 6, "save_steps": 3, "place": str(tmp_path)}
    [expected] = start(run)
    shutil.rmtree(tmp_path / "checkpoint-6")
    [found] = start(run)
    assert_gone_on(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_sharded_ranks_end_where_whole_ones_do(start, tmp_path, kind):
    """Also resumed in the middle, gone back to a snapshot, averaged, and saved whole."""
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind}}
    runs = {}
    for name, options in {"whole": {"whole_batches": True}, "sharded": sharding}.items():
        short = {"steps": 12, "save_steps": 6, "rollout": options}
        places = [str(tmp_path / f"{name}-{number}") for number in range(3)]
        again = {"on_trip": "warn", "place": places[2], "after": (places[0], 6), **short}
        runs[name] = start(
            {"on_trip": "warn", "place": places[0], **short},
            {"on_trip": "rollback", "place": places[1], **short},
            again,
        )
    for number, (split_ranks, whole_ranks) in enumerate(zip(runs["sharded"], runs["whole"], strict=True)):
        for split, whole in zip(split_ranks, whole_ranks, strict=True):
            assert all(split["parts"])
            assert not any(whole["parts"])
            assert split["tripped"] == whole["tripped"]
            assert split["completions"] == whole["completions"]
            for key in ("final", "average"):
                for ours, theirs in zip(split[key], whole[key], strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"sharded-{number}" / "saved")
        for ours, theirs in zip(saved.parameters(), split_ranks[0]["final"], strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(runs["sharded"][2], runs["sharded"][0], strict=True):
        for key in ("final", "average"):
            assert all(torch.equal(a, b) for a, b in zip(ours[key], theirs[key], strict=True))


@pytest.mark.slow
def test_both_ranks_leave_the_same_out_and_use_the_same_again(start, tmp_path):
    """And go on so from a checkpoint: with what each of them has kept of its rollout, and with the tokens of both counted."""
    rollout = {"rollout_every": "auto", "rollout_reuse": 3, "warmup_steps": 2}
    run = {"on_trip": "warn", "steps": 10, "save_steps": 5, "rollout": rollout, "place": str(tmp_path)}
    [expected] = start(run)
    keys = ("l3m/constraint_step", "l3m/sampled_tokens", "l3m/ess", "constraints/length/estimate")
    seen = [[[row.get(key) for key in keys] for row in run["log"] if "loss" in row] for run in expected]
    assert seen[0] == seen[1]
    steps, tokens, shares, _ = zip(*seen[0], strict=True)
    assert set(steps) == {0.0, 1.0}
    assert any(share is not None for share in shares)
    assert tokens[-1] == sum(run["tokens"] for run in expected)
    assert all(torch.equal(a, b) for a, b in zip(expected[0]["final"], expected[1]["final"], strict=True))
    shutil.rmtree(tmp_path / "checkpoint-10")
    [found] = start(run)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours["final"], theirs["final"], strict=True))
        logs = [[row for row in run["log"] if "loss" in row and row["step"] > 5] for run in (ours, theirs)]
        assert timeless(logs[0]) == timeless(logs[1])
