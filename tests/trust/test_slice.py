"""A slice of what `make trust` counts: a few cases of each part, which all have to be right."""

import subprocess
import sys
from pathlib import Path

import pytest
from goals import GOALS, parts_of
from parts import Skipped
from records import part_file, read

APART = ("full at every page", "Python: kernels")


def cases():
    """What needs processes of its own takes 30 to 70 s a part, of what other tests try too: `make test-full`."""
    for goal in GOALS:
        for part in parts_of(goal):
            if part.slice:
                slow = [pytest.mark.slow] if part.environment or part.name in APART else []
                yield pytest.param(goal, part, id=f"{goal.key}-{part.name}", marks=slow)


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
