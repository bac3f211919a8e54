"""The trainer and its watch on two processes, started as torchrun starts them: both act alike and end with the same weights."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import trainer_ranks
from training_runs import timeless

from l3ms.training import checkpoints


@pytest.fixture
def two_ranks(tmp_path, tokenizer, make_model):
    """two_ranks(on_trip, ...) -> what each rank found."""
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(gain=0.3).save_pretrained(tmp_path / "model")
    return functools.partial(start, tmp_path)


def start(folder, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
    }  # fmt: skip
    command = [sys.executable, trainer_ranks.__file__, str(folder / "model"), str(folder), *map(str, arguments)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(
    "on_trip", ["rollback", *(pytest.param(it, marks=pytest.mark.slow) for it in ("warn", "stop"))]
)
def test_both_ranks_see_the_same_and_act_alike(two_ranks, on_trip):
    first, second = two_ranks(on_trip)
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


def test_both_ranks_go_on_from_a_checkpoint(two_ranks, tmp_path):
    """Resumed in the middle, each rank ends with the bits of the run that was not interrupted."""
    expected = two_ranks("warn", 6, 3)
    place = tmp_path / "run"
    assert [path.name for path in checkpoints.checkpoints(place)] == ["checkpoint-6", "checkpoint-3"]
    assert {path.name for path in (place / "checkpoint-3").iterdir()} >= {
        "random_0.json", "random_1.json", "watch_0.json", "watch_1.json", "manifest.json",
    }  # fmt: skip
    shutil.rmtree(place / "checkpoint-6")
    found = two_ranks("warn", 6, 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["taken"], theirs["taken"]) == (3, 6)
        for key in ("final", "average"):
            assert all(torch.equal(a, b) for a, b in zip(ours[key], theirs[key], strict=True))
        assert ours["tripped"] == theirs["tripped"]
        # What a rank logs is of its own responses in part, and the checkpoint has the first one's
        logs = [timeless(row for row in run["log"] if "loss" in row and row["step"] > 3) for run in (ours, theirs)]
        assert len(logs[0]) == 3
        assert logs[0] == logs[1]


@pytest.mark.slow
def test_both_ranks_leave_the_same_out_and_use_the_same_again(two_ranks, tmp_path):
    """And go on so from a checkpoint: with what each of them has kept of its rollout, and with the tokens of both counted."""
    rollout = json.dumps({"rollout_every": "auto", "rollout_reuse": 3, "warmup_steps": 2})
    expected = two_ranks("warn", 10, 5, rollout)
    keys = ("l3m/constraint_step", "l3m/sampled_tokens", "l3m/ess", "constraints/length/estimate")
    seen = [[[row.get(key) for key in keys] for row in run["log"] if "loss" in row] for run in expected]
    assert seen[0] == seen[1]
    steps, tokens, shares, _ = zip(*seen[0], strict=True)
    assert set(steps) == {0.0, 1.0}
    assert any(share is not None for share in shares)
    assert tokens[-1] == sum(run["tokens"] for run in expected)
    assert all(torch.equal(a, b) for a, b in zip(expected[0]["final"], expected[1]["final"], strict=True))
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    found = two_ranks("warn", 10, 5, rollout)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours["final"], theirs["final"], strict=True))
        logs = [[row for row in run["log"] if "loss" in row and row["step"] > 5] for run in (ours, theirs)]
        assert timeless(logs[0]) == timeless(logs[1])
