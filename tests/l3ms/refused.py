"""How a case of bad input or a hostile artefact is run, and what must hold: one line, an exit code, nothing written, nothing run."""

import contextlib
import io
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS = 60  # in which a command ends, on a busy machine


class Hangs(BaseException):
    pass


@contextlib.contextmanager
def in_project(template: Path, folder: Path) -> Iterator[Path]:
    """A copy of a project, the current folder while it is used."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def run(arguments: list[str]) -> tuple[int, str, str]:
    """(exit code, what was printed, what was said on the standard error) of `l3ms ARGUMENTS`, in this process."""
    from l3ms.commands.command_line import main

    def hangs(*_):
        raise Hangs

    out, err = io.StringIO(), io.StringIO()
    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    except Hangs:
        code, err = -1, io.StringIO("hangs")
    except BaseException:
        code, err = -2, io.StringIO(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return code, out.getvalue(), err.getvalue()


def tree(folder: Path) -> dict[str, tuple]:
    """All that is in a folder, with what would change if it were written to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ino)
    return found


def wrong(make: Callable[[Path], list[str]], folder: Path, codes: tuple[int, ...] = (2, 3, 4, 5)) -> str | None:
    """What does not hold of a case in the project `folder`, the current one; None where all does."""
    arguments = make(folder)
    before, victim = tree(folder), (folder / "victim").read_bytes()
    code, out, err = run(arguments)
    if code not in codes:
        return f"exit {code}: {err.strip()[-300:]}"
    verdict = code in (3, 4) and err == "" and 0 in codes  # of a certificate, which is no refusal
    if "Traceback" in out + err or (code and not verdict and (err.count("\n") != 1 or not err.startswith("l3ms: "))):
        return f"exit {code}, not one line: {err[:300]!r}"
    if obeyed := {letter for letter in out + err if not (letter.isprintable() or letter in "\n\t")}:
        return f"exit {code}, a terminal would obey {obeyed}"
    if (folder / "canary").exists():
        return "the canary sang"
    if (folder / "victim").read_bytes() != victim:
        return "the victim was overwritten"
    after = tree(folder)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    changed = [name for name in changed if "__pycache__" not in name]
    if 0 in codes:  # it may write, but not there
        changed = [name for name in changed if name.startswith(("victim", "precious"))]
    return f"exit {code}, but written: {changed[:3]}" if changed else None
