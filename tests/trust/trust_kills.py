"""G9: what is left of a checkpoint, and of a whole run, when the process is killed: at each change that it makes to the disk, while it is
made, between two; or the power goes with it, and of what was not flushed nothing is left."""

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
import file_changes
import launches
import resumed_runs
import sharded_runs
import tiny_models
import torch
from file_changes import Change
from forks import speak_to
from parts import Found, Part, Skipped, each

from l3ms.training import checkpoints

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}
WAYS = ("before", "while", "power")  # a change is made; the last: before it, with what was not flushed
OTHERS = ("whole", "several", "adapters", "dual_ascent", "muon", "augmented_lagrangian", "penalty", "none")
WRITES = {"write", "open", "truncate", "allocate"}


# ---- a checkpoint ----


@functools.cache
def changes_of(kind: str) -> list[Change]:
    """Of the writing of one that nobody interrupts."""
    run = checkpointed.of(kind)
    place = run.folder / "counted" / "checkpoints"
    run.begin(place)
    code, made = file_changes.run(lambda: saving(run, place), place, lambda *_: None)
    assert code == 0, (run.folder / "said").read_text()
    run.check(place, named=True)
    return made


def saving(run: checkpointed.Run, place: Path) -> int:
    speak_to(run.folder / "said")
    run.save(place)
    return 0


def lose_power(made: list[Change]) -> None:
    """Half of a file that was not flushed is all that the disk has of it, also where its folder has another name by now."""
    dirty: set[str] = set()
    for change in made:
        if change.what in WRITES:
            dirty.add(change.path)
        elif change.what == "fsync":
            dirty.discard(change.path)
        elif change.source is not None:
            dirty = {
                change.path + path.removeprefix(change.source) if path.startswith(change.source) else path
                for path in dirty
            }
    for path in dirty:
        if os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)


def kill_checkpoint(seed: int) -> None:
    picks = random.Random(seed)
    kind, way = list(checkpointed.KINDS)[seed % len(checkpointed.KINDS)], picks.choice(WAYS)
    run = checkpointed.of(kind)
    at = picks.randint(1, len(changes_of(kind)))
    pause = picks.expovariate(5000)  # seconds; most changes take less

    def decide(number: int, change: Change) -> int | None:
        if number != at:
            return None
        return file_changes.AFTER if way == "while" else file_changes.KILL

    folder = run.folder / f"case-{seed}"
    place = folder / "checkpoints"
    run.begin(place)
    code, made = file_changes.run(lambda: saving(run, place), place, decide, pause=pause)
    ended = way == "while" and code == 0  # before it was killed: the last changes take less than the pause
    assert ended or code == -signal.SIGKILL, (kind, way, at, code, (run.folder / "said").read_text()[-500:])
    if way == "power":
        lose_power(made[:-1])
    try:
        run.check(
            place,
            named=any(done.source and done.path == str(place / f"checkpoint-{checkpointed.AT}") for done in made[:-1]),
        )
    except AssertionError as error:
        raise AssertionError(f"{kind}, {way} change {at} ({made[-1].what} {made[-1].path}): {error}") from error
    shutil.rmtree(folder)


def killed_checkpoints(seeds: range) -> Found:
    kinds = list(checkpointed.KINDS)
    try:
        found = each(kill_checkpoint, seeds)
        counts = [len(changes_of(kind)) for kind in {kinds[seed % len(kinds)] for seed in seeds}]
    except file_changes.Unsupported as error:
        raise Skipped(str(error)) from None
    found.figures["changes of the disk in a checkpoint"] = max(counts)
    return found


# ---- a whole run ----


class Project:
    """A run of one kind, and what comes of it where nobody kills it."""

    def __init__(self, kind: str):
        launches.load()
        torch.set_num_threads(1)
        self.folder = checkpointed.temporary()
        fields: dict[str, Any] = resumed_runs.CONFIGS.get(kind, {})
        self.config = resumed_runs.project(
            self.folder / "project", tiny_models.tokenizer(), tiny_models.make_model(), **fields
        )
        begun = time.monotonic()
        code, self.changes = self.train(self.folder / "whole", lambda *_: None)
        self.seconds = time.monotonic() - begun
        assert code == 0, self.errors()

    def train(self, out: Path, decide: Any, *arguments: str, **options: Any) -> tuple[int, list[Change]]:
        def act() -> int:
            speak_to(self.folder / "said")
            return resumed_runs.train(self.config, "--output", out, *arguments)

        return file_changes.run(act, out, decide, **options)

    def errors(self) -> str:
        return (self.folder / "said").read_text()[-2000:]


@functools.cache
def project_of(kind: str) -> Project:
    made = Project(kind)
    checkpointed.settle()
    return made


def kill_run(seed: int) -> None:
    """Once, twice or three times, at a change of its folder or at any moment, then to its end."""
    picks = random.Random(seed)
    kind = OTHERS[seed % len(OTHERS)]
    project = project_of(kind)
    out, arguments, kills = project.folder / f"out-{seed}", (), []
    for _ in range(picks.choice((1, 1, 2, 3))):
        at = picks.randint(1, len(project.changes)) if picks.random() < 0.6 else None
        moment = picks.uniform(0, project.seconds)
        begun = time.monotonic()

        def decide(number: int, change: Change, at: Any = at, end: float = begun + moment) -> int | None:
            if at is None:  # a moment is met at the change that comes next, or by the alarm of `run`
                return file_changes.KILL if time.monotonic() > end else None
            return file_changes.KILL if number == at else None

        code, made = project.train(out, decide, *arguments, until=begun + moment if at is None else None)
        kills.append(f"change {at} ({made[-1].what} {made[-1].path})" if at and made else f"{moment:.2f} s")
        arguments = ("--resume",)
        assert code in (0, -signal.SIGKILL), f"{kind}, {kills}: {code}: {project.errors()}"
        if code == 0:
            break
    if code:
        code, _ = project.train(out, lambda *_: None, *arguments)
        assert code == 0, f"{kind}, {kills}: {code}: {project.errors()}"
    try:
        resumed_runs.assert_same(out, project.folder / "whole")
    except AssertionError as error:
        raise AssertionError(f"{kind}, killed at {', '.join(kills)}: {error}") from error
    shutil.rmtree(out)


def killed_runs(seeds: range) -> Found:
    try:
        return each(kill_run, seeds)
    except file_changes.Unsupported as error:
        raise Skipped(str(error)) from None


# ---- checkpoints of which each rank writes a part ----


@functools.cache
def sharded() -> sharded_runs.Sharded:
    made = sharded_runs.Sharded()
    checkpointed.settle()
    return made


def kill_ranks(seed: int) -> None:
    picks, runs = random.Random(seed), sharded()
    at, way = picks.randint(1, len(runs.changes)), picks.choice((file_changes.KILL, file_changes.AFTER))
    name = f"case-{seed}"
    code, made = runs.train(name, lambda number, change: way if number == at else None)
    assert code == -signal.SIGKILL, f"change {at}: {code}: {runs.errors(name)}"
    what = f"change {at} ({made[-1].what} {made[-1].path})"
    place = runs.folder / name / "run"
    for folder in checkpoints.checkpoints(place):
        assert checkpoints.problem(folder) is None, f"{what}: {folder}: {checkpoints.problem(folder)}"
    code, _ = runs.train(name, lambda *_: None)
    assert code == 0, f"{what}, gone on with: {runs.errors(name)}"
    for ours, theirs in zip(runs.found(name), runs.weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"{what}: it ends with other bits"
    left = {path.name for path in place.iterdir()} - {"saved"}
    assert left == {"checkpoint-2", "checkpoint-4"}, f"{what}: left {left}"
    shutil.rmtree(runs.folder / name)


def killed_ranks(seeds: range) -> Found:
    try:
        return each(kill_ranks, seeds)
    except file_changes.Unsupported as error:
        raise Skipped(str(error)) from None


def parts() -> list[Part]:
    return [
        Part("checkpoints", killed_checkpoints, 1000, slice=2, piece=200, environment=ENVIRONMENT, seconds=270),
        Part("runs", killed_runs, 30, piece=10, environment=ENVIRONMENT, seconds=120),
        Part("ranks in shards", killed_ranks, 4, piece=4, environment=ENVIRONMENT, seconds=60),
    ]
