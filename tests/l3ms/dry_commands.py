"""Commands that read all that they are given, and then tell it instead of going on: for inputs by the ten thousand, in one process."""

import contextlib
import importlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import refused
import typer.main

from l3ms.commands.command_line import app

# Where a command goes on once its options and files are read -> what it returns there.
ENDS = {
    "l3ms.runs.executing.train": None,
    "l3ms.verdicts.checking.check": None,
    "l3ms.verdicts.certifying.certify": {"verdict": "SATISFIED"},
    "l3ms.runs.report.plot_run": "report.png",
    "l3ms.benchmark.run.execute": None,
    "l3ms.commands.bench_iteration.execute": None,
    "l3ms.demo.run.main": None,
    "l3ms.demo.real.main": None,
}
LINE = re.compile(
    r"l3ms: ([^\s:].*: .*|.+ \(see l3ms.* --help\))\n"
)  # a field, an option or a file, and what is wrong with it
LONGEST = 2100


@contextlib.contextmanager
def dry(reading: Callable[..., Any] | None = None) -> Iterator[list[tuple[str, tuple, dict]]]:
    """A list of what the commands would have gone on with, in an empty folder. `reading`: called instead, where it is `train`."""
    told: list[tuple[str, tuple, dict]] = []

    def end(name: str, result: Any) -> Callable[..., Any]:
        def tell(*values: Any, **named: Any) -> Any:
            if reading is not None and name.endswith("executing.train"):
                values = (reading(*values),)
            told.append((name, values, named))
            return result

        return tell

    built = typer.main.get_command(app)  # typer would make it anew each time, which takes longer than all else
    folder = Path(tempfile.mkdtemp()).resolve()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, result in ENDS.items():
                module, _, function = name.rpartition(".")
                patch.setattr(importlib.import_module(module), function, end(name, result))
            patch.setattr(typer.main, "get_command", lambda _: built)
            patch.chdir(folder)
            yield told
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def attempt(arguments: list[str], told: list[tuple[str, tuple, dict]]) -> tuple[tuple[str, tuple, dict] | None, str]:
    """(what the command goes on with, None where it refuses; its line). AssertionError unless it does one of the two as it must."""
    told.clear()
    code, out, err = refused.run(arguments)
    shown = f"{' '.join(arguments)[:150]!r}: exit {code}: {err[-300:]!r}"
    assert code in (0, 2), shown
    assert "Traceback" not in out + err, shown
    if code == 0:
        assert len(told) <= 1, shown  # none: help, a version
        assert err == "", shown
        return (told[0] if told else ("", (), {})), ""
    assert not told, shown
    assert LINE.fullmatch(err), shown
    assert err[:-1].isprintable(), shown
    assert len(err) <= LONGEST, shown
    return None, err
