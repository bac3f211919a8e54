"""A slice of what `make trust` counts: a few cases of each part, which all have to be right."""

import subprocess
import sys
from pathlib import Path

import pytest
from goals import GOALS, parts_of
from parts import Skipped
from records import part_file, read

# Parts that take 7 to 60 s, of what other tests try too: `make test-full`, as all that need processes of their own.
LONG = (
    "G3-torch's samples", "G7-noisy", "G8-SGD", "G8-float64", "G10-full at every page", "G14-models and texts", "G16-soak",
    "G17-Python: kernels",
)  # fmt: skip


def cases():
    for goal in GOALS:
        for part in parts_of(goal):
            if part.slice:
                name = f"{goal.key}-{part.name}"
                slow = [pytest.mark.slow] if part.environment or name in LONG else []
                yield pytest.param(goal, part, id=name, marks=slow)


@pytest.mark.parametrize(("goal", "part"), list(cases()))
def test_slice(goal, part, tmp_path):
    if part.environment:
        here = Path(__file__).parent
        command = [sys.executable, str(here), "--only", goal.key, "--slice", "--jobs", "1", "--folder", str(tmp_path)]
        done = subprocess.run([*command, "--parts", part.name], cwd=here.parents[1], capture_output=True, text=True)
        found = read(part_file(tmp_path, goal, part))
        assert found, done.stdout + done.stderr
        if found["skipped"]:
            pytest.skip(found["skipped"])
        assert (found["failures"], found["failed"], found["cases"]) == ([], 0, part.slice), done.stdout + done.stderr
        return
    try:
        found = part.run(range(part.slice))
    except Skipped as reason:
        pytest.skip(str(reason))
    if part.close and not found.skipped:
        part.close(found)
    assert (found.failures, found.failed, found.cases) == ([], 0, part.slice)
