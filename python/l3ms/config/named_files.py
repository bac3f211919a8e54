"""Files that an option or a field names: what cannot be read or written is refused by that name, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from l3ms.config.yaml_reader import ConfigError
from l3ms.regular_files import is_regular


def check_readable(name: str, path: Path) -> None:
    """Raise `ConfigError(name, ...)` unless there is a regular file, or a link to one."""
    if not _exists(path):
        raise ConfigError(name, f"no such file: {path}")
    if not is_regular(path):
        raise ConfigError(name, f"is not a regular file: {path}")


def check_writable(name: str, path: Path) -> None:
    """Raise `ConfigError(name, ...)` unless a file may be written there, or replaced: a folder, a FIFO or a device is not."""
    if not os.path.isdir(path.parent):
        raise ConfigError(name, f"no such folder: {path.parent}")
    if os.path.isdir(path):
        raise ConfigError(name, f"is a folder: {path}")
    if _exists(path) and not is_regular(path):
        raise ConfigError(name, f"is not a regular file: {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(name, f"cannot be written: {path.parent} is not a folder that can be written to")
    if len(os.fsencode(path.name)) > 240:  # the name under which it is written is a little longer
        raise ConfigError(name, f"has a name that is too long: {path.name[:40]}...")


def check_place(name: str, folder: Path) -> None:
    """Raise `ConfigError(name, ...)` unless there is a folder, or can be one."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(name, f"must be a folder, and {folder} is a file")
    except OSError as error:  # a name that is too long, links in a circle
        raise ConfigError(name, f"cannot be a folder ({error.strerror}): {str(folder)[:80]}") from None


def _exists(path: Path) -> bool:
    """False for names that none can have, and for a link to nowhere."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False
