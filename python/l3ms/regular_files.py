"""Files that somebody else names: a FIFO, a device or a socket is refused rather than waited on, and what is wrong is an `OSError` always.

`open` waits for ever on a FIFO without a writer, reads for ever from /dev/zero, and raises `ValueError` for a name with a NUL character,
`UnicodeEncodeError` for half a character in it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, open for reading bytes; symbolic links are followed.

    Raises `OSError`, whose `strerror` says it in words: "No such file or directory", "is a FIFO, not a regular file".
    """
    _check(path, _stat(path))  # to open a device may do something already
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _check(path, os.fstat(descriptor))  # it may be another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """All of the file; `OSError` as `open_regular`, and where it is larger than `most` bytes."""
    with open_regular(path) as file:
        data = file.read() if most is None else file.read(most + 1)
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"is larger than {most} bytes", os.fspath(path))
    return data


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file, or a link to one; False for whatever cannot be looked at."""
    try:
        return stat.S_ISREG(_stat(path).st_mode)
    except OSError:
        return False


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise `OSError` for the first thing in `folder`, or in a folder in it, that is neither a regular file nor a folder.

    For those that are read by somebody else's code: a model's, a tokenizer's.
    """
    for pattern in ("*", "*/*"):
        for path in Path(folder).glob(pattern):
            try:
                found = _stat(path)
            except FileNotFoundError:  # a link to nowhere: whoever reads it says so
                continue
            if not stat.S_ISDIR(found.st_mode):
                _check(path, found)


def _stat(path: str | os.PathLike[str]) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError as error:  # NUL, half a character
        what = "NUL character" if "null" in str(error) else "character that no name can have"
        raise OSError(errno.EINVAL, f"the name holds a {what}", repr(os.fspath(path))) from None


def _check(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", os.fspath(path))
