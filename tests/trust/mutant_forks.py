"""A process that has imported what tests need, and forks for each mutant: importing torch for every one of them would take the longest.

    python mutant_forks.py torch pytest ...      modules that are imported before the first fork

On stdin a line of JSON for each run, {"root", "tests", "environment", "limit"}; on stdout one, {"code", "said"}: pytest's exit code,
negative where a signal ended it, None where time did. The tests are those of the tree `root`, and so is what they import.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path


def child(job: dict, output: int) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    root = Path(job["root"])
    os.chdir(root)
    os.environ |= {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}",
        **job["environment"],
        **job.get("variables", {}),
    }
    sys.path[:0] = [str(root), str(root / "python"), *job.get("path", [])]
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in job["environment"]
    if plugin := job.get("plugin"):
        importlib.import_module(plugin)
    import pytest

    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that were imported before the fork
    code = pytest.main([*options, *job["tests"]])
    sys.stdout.flush()
    os._exit(int(code))


def run(job: dict) -> dict:
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            try:
                child(job, output.fileno())
            except BaseException:
                os.write(output.fileno(), traceback.format_exc().encode())
            os._exit(3)
        deadline, status = time.monotonic() + job["limit"], None
        while status is None and time.monotonic() < deadline:
            done, waited = os.waitpid(pid, os.WNOHANG)
            status = waited if done else None
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):  # what it has started too
            os.killpg(pid, signal.SIGKILL)
        if status is None:
            os.waitpid(pid, 0)
        output.seek(0)
        said = output.read().decode(errors="replace")[-3000:]
    return {"code": None if status is None else os.waitstatus_to_exitcode(status), "said": said}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print is no answer
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
