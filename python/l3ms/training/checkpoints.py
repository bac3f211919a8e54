"""Checkpoints that are whole or not there: folders `checkpoint-N` with a manifest.

A checkpoint is written under another name. When all is in it, its files are flushed to the disk, then `manifest.json`, with the size and
the SHA-256 of each, is written and flushed, and last the folder gets its name. So whatever ends the process, and when: a folder with that
name is whole, and what the disk has lost later is found out. One that is replaced is kept until the new one has the name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from l3ms.regular_files import open_regular, read_regular

MANIFEST = "manifest.json"
PARTIAL = ".checkpoint.partial"  # beside the checkpoints; what is found here is of a process that was ended
REPLACED = "replaced"  # in it: the checkpoint whose name another one is about to get
TRIED = 1 << 16  # bytes
NAME = re.compile(r"checkpoint-(\d+)")


def rank_suffix(args: Any) -> str:
    """Of the names of files of which each rank has its own."""
    return "" if args.world_size <= 1 else f"_{args.process_index}"


def begin(place: Path) -> Path:
    """An empty folder among the checkpoints in `place`, to be filled and then given to `seal`."""
    partial = place / PARTIAL
    discard(place)
    partial.mkdir(parents=True)
    return partial


def discard(place: Path) -> None:
    """Remove what was begun in `place` and not sealed. What it was about to replace has its name again."""
    partial = place / PARTIAL
    if partial.is_symlink():  # somebody put it there, to have something elsewhere filled or removed
        partial.unlink()
    for path in _replaced(place):
        path.rename(place / path.name)
    shutil.rmtree(partial, ignore_errors=True)


def seal(folder: Path, name: str) -> Path:
    """Flush all of `folder/name`, where `folder` is from `begin`, write its manifest, and put it beside `folder`. -> where it is now.

    A checkpoint of that name is replaced.
    """
    source, place = folder / name, folder.parent
    _write(source / MANIFEST, _described(source, _files(source)))
    for path in (source, *(path for path in source.rglob("*") if path.is_dir())):
        _flush(path)
    target = place / name
    if os.path.lexists(target):
        (folder / REPLACED).mkdir()
        target.rename(folder / REPLACED / name)
    source.rename(target)
    _flush(place)
    discard(place)
    return target


def seal_again(folder: Path) -> None:
    """What was put into a sealed checkpoint since, or written anew in it, belongs to it too."""
    manifest, partial = folder / MANIFEST, folder.parent / PARTIAL
    described, sealed = json.loads(manifest.read_text(encoding="utf-8"))["files"], manifest.stat().st_mtime_ns
    names = {path: path.relative_to(folder).as_posix() for path in _files(folder) if path != manifest}
    later = [path for path, name in names.items() if name not in described or path.stat().st_mtime_ns > sealed]
    if not later:
        return
    described |= _described(folder, later)
    for path in {path.parent for path in later}:
        _flush(path)
    begin(folder.parent)
    _write(partial / MANIFEST, described)
    (partial / MANIFEST).replace(manifest)
    _flush(folder)
    discard(folder.parent)


def _described(folder: Path, files: Iterable[Path]) -> dict[str, Any]:
    """By name in `folder`, flushed to the disk: size and contents."""
    found = {}
    for path in sorted(files):
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    return found


def _write(manifest: Path, described: dict[str, Any]) -> None:
    with manifest.open("w", encoding="utf-8") as file:
        json.dump({"version": 1, "files": dict(sorted(described.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def unwritable(folder: Path) -> OSError | None:
    """Why nothing can be written to `folder` now, None where something can: torch.save says that it could not, and not why."""
    path = folder / "tried"
    try:
        path.write_bytes(bytes(TRIED))
        _flush(path)
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is there, of the size and the contents that were written."""
    if folder.is_symlink():
        return "it is a link"
    try:
        described = json.loads(read_regular(folder / MANIFEST).decode("utf-8"))["files"]
        wanted = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in described.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not finished, or is not one of ours"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    try:
        found = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
        for name in sorted(wanted.keys() ^ found):
            return f"{name} is missing" if name in wanted else f"{name} is not in its {MANIFEST}"
        for name, (size, digest) in wanted.items():
            path = folder / PurePosixPath(name)
            if path.is_symlink() or path.stat().st_size != size or _sha256(path) != digest:
                return f"{name} is not what was written"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def checkpoints(place: Path) -> list[Path]:
    """The checkpoints in `place`, the newest first, valid or not."""
    if not place.is_dir():
        return []
    there = [path for path in place.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted([*there, *_replaced(place)], key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _replaced(place: Path) -> list[Path]:
    """Of a process that was ended while one took the place of another: the other, which has a name no more."""
    folder = place / PARTIAL / REPLACED
    if folder.parent.is_symlink() or folder.is_symlink() or not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return [path for path in found if not os.path.lexists(place / path.name)]


def newest(place: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest valid checkpoint in `place`, None where there is none; and what is wrong with those that are newer."""
    damaged: dict[Path, str] = {}
    for folder in checkpoints(place):
        wrong = problem(folder)
        if wrong is None:
            return folder, damaged
        damaged[folder] = wrong
    return None, damaged


def rotate(place: Path, limit: int | None, keep: Path | None = None, newest: Path | None = None) -> None:
    """Remove all but the newest `limit` checkpoints (None or 0: none are). `keep` is one of these, and beside the newest where that is one.

    `newest`: the one that was written now. Those with more steps are of another run in the same place: they are the oldest.
    """
    there = checkpoints(place)
    if newest is not None:
        there.sort(key=lambda path: _step(path) > _step(newest))
    if keep in there[1:]:
        there.remove(keep)
        there.insert(1, keep)
        limit = max(limit, 2) if limit else limit
    for folder in there[limit:] if limit else []:
        # Not under its name while it is being removed: half of it would be taken for a damaged one
        gone = place / PARTIAL
        discard(place)
        folder.rename(gone)
        discard(place)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """A file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
