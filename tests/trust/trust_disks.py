"""G10: the disk has no room, at every 4 KiB of a checkpoint; a quota is reached or a disk fails, at every change that is made to it."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpointed
import file_changes
import trust_kills
from file_changes import Change
from forks import speak_to
from parts import Found, Part, Skipped, each

from l3ms.commands import command_line
from l3ms.commands.ending import ENVIRONMENT
from l3ms.training import checkpoints

PAGE = 4096
PAGES = 50  # for each kind; a checkpoint has fewer, so that the last ones are whole
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
MOUNTED, NAMESPACE, USER = 32, 0x20000, 0x10000000  # MS_REMOUNT, CLONE_NEWNS, CLONE_NEWUSER
NO_MOUNT = 97


# ---- what a process of its own does ----


def command(act: Callable[[], Any]) -> int:
    """The exit code of `l3ms`, whose command is `act`."""
    command_line._run = lambda arguments, command: act() or 0  # type: ignore[assignment]
    return command_line.main(["train"])


def mount(place: Path) -> None:
    """A small file system that this process alone sees, from a parent which has imported torch."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NAMESPACE | USER):
        os._exit(NO_MOUNT)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=64m"):
        os._exit(NO_MOUNT)


def resize(place: Path, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", MOUNTED, b"size=%d" % size):
        raise OSError(ctypes.get_errno(), "remount")


def used(place: Path) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def fill(run: checkpointed.Run, mounted: Path, pages: int, *, goes_on: bool) -> int:
    """The checkpoint on a disk with room for so many pages. -> 0 where all is right"""
    mount(mounted)
    place = mounted / "out" / "checkpoints"
    run.begin(place)
    resize(mounted, used(mounted) + PAGE * pages)
    code = checkpointed.quietly(lambda: command(lambda: run.save(place)), run.folder / "said")
    resize(mounted, 64 << 20)
    check(run, place, code, said="the disk is full: ", goes_on=goes_on)
    return 0


# ---- what is looked at ----


def check(
    run: checkpointed.Run, place: Path, code: int, *, said: str, goes_on: bool, removal_failed: bool = False
) -> None:
    """It went well, or ended with one line and exit code 5 and left what was there before; with the room it goes on."""
    lines = (run.folder / "said").read_text().splitlines()
    if code == 0:
        assert not lines, lines
        assert checkpoints.newest(place) == (place / f"checkpoint-{checkpointed.AT}", {})
    else:
        assert code == ENVIRONMENT, (code, lines)
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"l3ms: {said}"), lines
    there = {path.name for path in place.iterdir()}
    if code and not removal_failed:
        before = {f"checkpoint-{step}" for step in run.options["before"]}
        sealed = {f"checkpoint-{checkpointed.AT}"}  # of an error after it has its name
        assert there in (before, *([before | sealed] if (place / f"checkpoint-{checkpointed.AT}").exists() else [])), (
            there
        )
    for name in there - {checkpoints.PARTIAL}:
        assert checkpoints.problem(place / name) is None, (name, checkpoints.problem(place / name))
        assert run.digest(place / name) == run.digests[int(name.partition("-")[2])], f"{name} has other contents"
    if goes_on:
        run.check(place, named=code == 0)


# ---- a checkpoint ----


def full_disk(seed: int) -> None:
    kinds = list(checkpointed.KINDS)
    run, pages = checkpointed.of(kinds[seed % len(kinds)]), 1 + seed // len(kinds) % PAGES
    mounted = run.folder / "mounted"
    mounted.mkdir(exist_ok=True)
    goes_on = seed % 5 == 0
    code = checkpointed.quietly(lambda: fill(run, mounted, pages, goes_on=goes_on), run.folder / "found")
    if code == NO_MOUNT:
        raise Skipped("no small file system can be mounted here")
    assert code == 0, f"{run.kind}, {pages} pages: {last_line(run.folder / 'found')}"


def last_line(path: Path) -> str:
    return (path.read_text().strip().splitlines() or ["it said nothing"])[-1]


def full_disks(seeds: range) -> Found:
    return each(full_disk, seeds)


def failing(number: int, error: int, stays: bool, failed: list[str]) -> Callable[[int, Change], int | None]:
    """For `file_changes.run`: the change of that number fails by `error`, and if it `stays` all that write later; `failed` has which."""

    def decide(at: int, change: Change) -> int | None:
        if at == number or (stays and at > number and change.what not in ("remove", "rename")):
            failed.append(change.what)
            return error
        return None

    return decide


def failing_change(seed: int) -> None:
    """One change fails, or it and all that would write after it, as where the disk stays full."""
    picks = random.Random(seed)
    run = checkpointed.of(list(checkpointed.KINDS)[seed % len(checkpointed.KINDS)])
    number, error = picks.randint(1, len(trust_kills.changes_of(run.kind))), ERRORS[seed % len(ERRORS)]
    stays = picks.random() < 0.5
    failed: list[str] = []
    decide = failing(number, error, stays, failed)
    folder = run.folder / f"case-{seed}"
    place = folder / "checkpoints"
    run.begin(place)

    def act() -> int:
        speak_to(run.folder / "said")
        return command(lambda: run.save(place))

    code, made = file_changes.run(act, place, decide)
    said = "the disk is full: " if error == errno.ENOSPC else ""
    try:
        check(run, place, code, said=said, goes_on=seed % 5 == 0, removal_failed="remove" in failed)
        what = "" if code == 0 else (run.folder / "said").read_text()
        unknown = (
            "a file could not be written: " in what and not stays
        )  # torch.save does not say, and it can be written to again
        assert code == 0 or os.strerror(error) in what or unknown, f"it does not say why: {what}"
    except AssertionError as found:
        where = f"{run.kind}, {os.strerror(error)} in change {number} ({made[number - 1].what} {made[number - 1].path})"
        raise AssertionError(f"{where}{' and after' * stays}: {found}") from found
    shutil.rmtree(folder)


def failing_changes(seeds: range) -> Found:
    try:
        return each(failing_change, seeds)
    except file_changes.Unsupported as error:
        raise Skipped(str(error)) from None


# ---- a whole run: its configuration, log, checkpoints, weights, report ----


def failing_run(seed: int) -> None:
    picks = random.Random(seed)
    project = trust_kills.project_of("whole")
    number, error, stays = picks.randint(1, len(project.changes)), picks.choice(ERRORS), picks.random() < 0.7
    failed: list[str] = []
    decide = failing(number, error, stays, failed)
    out = project.folder / f"out-{seed}"
    code, made = project.train(out, decide)
    where = f"{os.strerror(error)} in change {number} ({made[number - 1].what} {made[number - 1].path}){' and after' * stays}"
    lines = [line for line in project.errors().splitlines() if "training goes on" not in line]
    assert code in (0, ENVIRONMENT), f"{where}: exit code {code}: {lines}"
    assert len(lines) == (code != 0), f"{where}: {lines}"
    assert code == 0 or os.strerror(error) in lines[0], f"{where}: it does not say why: {lines}"
    partial = [name for name in file_changes.files(out) if "partial" in name] if out.exists() else []
    assert "remove" in failed or not partial, f"{where}: left {partial}"
    if code:
        code, _ = project.train(
            out, lambda *_: None, *(["--resume"] if (out / "config.yaml").exists() else ["--overwrite"])
        )
        assert code == 0, f"{where}, resumed: {project.errors()}"
    trust_kills.resumed_runs.assert_same(out, project.folder / "whole")
    shutil.rmtree(out)


def failing_runs(seeds: range) -> Found:
    try:
        return each(failing_run, seeds)
    except file_changes.Unsupported as error:
        raise Skipped(str(error)) from None


def parts() -> list[Part]:
    options: dict[str, Any] = {"environment": trust_kills.ENVIRONMENT}
    return [
        Part(
            "full at every page", full_disks, PAGES * len(checkpointed.KINDS), slice=2, piece=200, seconds=40, **options
        ),
        Part("every change fails", failing_changes, 240, piece=120, seconds=40, **options),
        Part("a change of a run fails", failing_runs, 16, seconds=40, **options),
    ]
