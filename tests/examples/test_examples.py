"""Each example runs, tiny: as a program of its own, as a reader runs it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments, folder):
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_each_is_short_enough_to_be_read():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert scripts
    assert {path.name: count for path in scripts if (count := len(path.read_text().splitlines())) > 80} == {}


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning(project, checkpoint):
    printed = run("lightning_loop.py", checkpoint, "rows.jsonl", 4, 9, 6, 16, folder=project)
    assert "'constraints/length/lambda': " in printed
