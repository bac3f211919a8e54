"""The trainer and its watch on two processes, started as torchrun starts them: both act alike and end with the same weights."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import trainer_ranks


@pytest.fixture(params=["rollback", *(pytest.param(other, marks=pytest.mark.slow) for other in ("warn", "stop"))])
def two_ranks(request, tmp_path, tokenizer, make_model):
    """-> `on_trip`, and what each rank found."""
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(gain=0.3).save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
    }  # fmt: skip
    command = [sys.executable, trainer_ranks.__file__, str(tmp_path / "model"), str(tmp_path), request.param]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return request.param, [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_both_ranks_see_the_same_and_act_alike(two_ranks):
    on_trip, (first, second) = two_ranks
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
