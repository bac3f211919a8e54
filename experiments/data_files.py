"""Data that an experiment cannot make: a file that somebody has, named by --data or an environment variable."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from l3ms.config.yaml_reader import ConfigError


def data_file(given: str | Path | None, variable: str, wanted: str) -> Path:
    """The file that is named. ConfigError in one line, with what is `wanted`, where none is or there is none."""
    text = given or os.environ.get(variable)
    if not text:
        raise ConfigError("data", f"needs {wanted}")
    path = Path(text).expanduser()
    if not path.is_file():
        raise ConfigError("data", f"no such file: {path}; wanted {wanted}")
    return path


def json_lines(path: Path) -> list[str]:
    """The lines of a JSONL file, without their ends. Not `str.splitlines`, which cuts at U+2028 too: JSON leaves it as it is in a text."""
    with path.open(encoding="utf-8-sig") as file:
        return [line.rstrip("\n") for line in file]


def fingerprint(path: Path) -> str:
    """sha256 of a file, the first 16 digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
