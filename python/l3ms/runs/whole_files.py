"""Files that are whole or not there, and JSON that any reader takes. No link is followed where something is written or removed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

NO_LINK, NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)  # Windows has neither


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (NaN and infinity become null), whole or not at all."""
    write_whole(path, f"{json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False)}\n")


def write_whole(path: Path, contents: str | bytes) -> None:
    """Whatever ends the process, a reader sees the old file or the new one, never half. A link at `path` is replaced, not followed."""
    partial = path.with_name(f".{path.name}.partial")
    data = contents.encode("utf-8") if isinstance(contents, str) else contents
    try:
        with open_new(partial) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_new(path: Path) -> BinaryIO:
    """A file that was not there before, to be written. What is there (of a process that was ended, or a link that somebody put there to
    have another file overwritten) goes."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), "wb")


def open_to_append(path: Path) -> BinaryIO:
    """A regular file, or one that is new; `OSError` for a link and whatever else is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK | NO_WAIT, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "ab")


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link and not what it leads to; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """`value` with plain Python numbers, and None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
