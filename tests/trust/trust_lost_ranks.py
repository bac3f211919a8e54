"""G12: one of two or four ranks is killed, or stopped, at any moment of a run, from when they have met to the end: the others end in time,
with exit code 5, and name it. Of eight two are gone on with, and have the bits of the one that was not interrupted."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import checkpointed
import killed_ranks
import launches
import resumed_runs
import tiny_models
from parts import Found, Part, Skipped, each

WORLDS, SIGNALS = (2, 4), (signal.SIGKILL, signal.SIGSTOP)
LATER = 10  # seconds beyond the timeout
TRAIN = {"iterations": 6, "save_steps": 2, "agree_every": 2}
THREADS = 3  # of a rank that has begun to look out


@functools.cache
def project() -> Path:
    launches.load()
    folder = checkpointed.temporary()
    return resumed_runs.project(
        folder / "project", tiny_models.tokenizer(), tiny_models.make_model(), train=TRAIN,
        evaluate={"samples": 17, "batch_size": 8, "initial": True},
    )  # fmt: skip


@functools.cache
def whole(world: int) -> tuple[Path, float]:
    """The run that nobody interrupts, and how long it takes from when the ranks have met."""
    place = project().parent.parent / f"whole-{world}"
    launch = launches.Launch(world, ["train", project(), "--output", place / "out"], place / "said")
    met(launch)
    begun = time.monotonic()
    assert set(launch.wait(300).values()) == {0}, launch.errors()
    return place / "out", time.monotonic() - begun


def met(launch: Any) -> None:
    while any(_threads(process) < THREADS for rank, process in launch.processes.items() if rank not in launch.codes):
        launch.poll()
        time.sleep(0.005)


def _threads(process: int) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except FileNotFoundError:
        return THREADS


def lost_rank(seed: int) -> float:
    picks = random.Random(seed)
    world, number = WORLDS[seed % 2], SIGNALS[seed // 2 % 2]
    rank, moment = picks.randrange(world), picks.random()
    expected, seconds = whole(world)
    folder = project().parent.parent / f"case-{seed}"

    def until(launch: Any) -> None:
        met(launch)
        time.sleep(moment * seconds)

    row = killed_ranks.hit(project(), folder, world, number, rank, until)
    what = f"{world} ranks, {signal.Signals(number).name} of rank {rank} after {moment * seconds:.1f} s"
    others = {other: row["codes"].get(other) for other in range(world) if other != rank}
    said = [line for line in row["said"].splitlines() if "training goes on" not in line]
    if rank in row["before"] or set(others.values()) == {0}:  # it had done its part
        assert (folder / "out" / "report.json").exists(), f"{what}: {row}"
        assert set(others.values()) == {0}, f"{what}: {row}"
        shutil.rmtree(folder)
        return 0.0
    assert set(others.values()) == {5}, f"{what}: exit codes {others}, said {said}"
    assert len(said) == 1, f"{what}: {said}"
    assert f"rank {rank}" in said[0], f"{what}: not named: {said}"
    if seed % 8 in (1, 4):  # killed, of four and of two
        codes, errors = killed_ranks.resume(project(), folder, world)
        assert set(codes.values()) == {0}, f"{what}, resumed: {codes} {errors}"
        resumed_runs.assert_same(folder / "out", expected)
    shutil.rmtree(folder)
    return max(row["seconds"].values()) / (killed_ranks.TIMEOUT + LATER)


def lost_ranks(seeds: range) -> Found:
    if not hasattr(os, "fork") or not Path("/proc/self/task").exists():
        raise Skipped("ranks are forked, and watched in /proc: on Linux")
    return each(lost_rank, seeds)


def parts() -> list[Part]:
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # as the command sets it, before torch is imported
    return [Part("killed and stopped", lost_ranks, 20, slice=1, piece=5, environment=environment, seconds=100)]
