"""How a command ends: what went wrong in one line, and the exit code that says of what kind it is."""

from __future__ import annotations

import errno
import re
from typing import Any

from l3ms.extras import missing
from l3ms.runs.terminal import printable

MOST = 2000  # characters of a line: a key, a name, a cell of somebody's may have a million
BAD_INPUT, ENVIRONMENT, INTERRUPTED = 2, 5, 130
RUST = re.compile(r"\(os error \d+\)")  # of safetensors' and tokenizers' errors, which are no OSError
TORCH_SAVE = ("inline_container.cc", "iostream error")  # it could not write, and does not say why
NO_MEMORY = "DefaultCPUAllocator: "  # of a RuntimeError: torch's, on the host


class Interrupted(Exception):
    """Ctrl-C, with what was kept; typer would drop the words of a KeyboardInterrupt."""


def explain(error: Exception) -> tuple[str, int]:
    """(one line, exit code) for what a command raised. Nothing in it is obeyed by a terminal."""
    text, code = _explained(error)
    line = printable(" ".join(text.split()))
    return line if len(line) <= MOST else f"{line[: MOST - 300]} ... {line[-295:]}", code


def _explained(error: Exception) -> tuple[str, int]:
    if hasattr(error, "format_message"):  # wrong use of the command line, from typer
        return _usage(error), BAD_INPUT
    text = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
    if isinstance(error, Interrupted):
        return text, INTERRUPTED
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"the disk is full: {text}", ENVIRONMENT
    if isinstance(error, ImportError) and (line := missing("this command", error)):
        return line, ENVIRONMENT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in text:
        return f"out of memory: {text}; smaller batch sizes or train.activation_checkpointing may help", ENVIRONMENT
    if isinstance(error, OSError) or RUST.search(text) or type(error).__name__ == "Disagreement":
        return text, ENVIRONMENT
    if isinstance(error, RuntimeError) and any(words in text for words in TORCH_SAVE):
        return f"a file could not be written: {text}", ENVIRONMENT
    if isinstance(error, ValueError):
        return text, BAD_INPUT
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def broken_off(line: str) -> str:
    """Of a collective, without where in the library's source it was, and its advice."""
    return (
        re.sub(r"\[\S*gloo/\S*\] |^\w*Error: ", "", line).partition(" This is typically")[0].partition(" (--debug")[0]
    )


def _usage(error: Any) -> str:
    """What typer says of wrong arguments, with what was given and whose help says more."""
    reasons = getattr(
        error.__cause__, "errors", list
    )()  # typer has options read by pydantic, which leaves out what it got
    given = f", got {reasons[0]['input']!r}" if reasons else ""
    command = "l3ms" if error.ctx is None else error.ctx.command_path
    return f"{error.format_message()}{given} (see {command} --help)"
