"""Forks of a process that has its imports done, which do one thing and end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def forked(act: Callable[[], Any], said: Path | None = None, output: str | Path = os.devnull, failed: int = 1) -> int:
    """A process that does `act`, with its errors in `said` (None: it speaks where this one does), and ends with the number that this
    returns, or with `failed`. -> its id"""
    process = os.fork()
    if process == 0:
        code = failed
        try:
            if said is not None:
                speak_to(said, output)
            code = act() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process


def speak_to(errors: Path, output: str | Path = os.devnull) -> None:
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)


def ended(process: int) -> int:
    """Its exit code, once it has one."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
