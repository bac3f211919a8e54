"""What a release says of itself is the changelog's section of that version, or there is no release."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from release_notes import notes  # noqa: E402

TEXT = "# Changelog\n\n## 0.3.0 (unreleased)\n\n* new\n\n## 0.2.0 (2026-12-01)\n\n* one\n  more\n* two\n\n## 0.1.0\n\n* first\n\n## 0.0.9\n"


def test_the_section_of_the_version_and_no_other():
    assert notes("v0.2.0", TEXT) == "* one\n  more\n* two\n"
    assert notes("v0.1.0", TEXT) == "* first\n"


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("v0.3.0", "unreleased"),
        ("v0.0.9", "nothing of 0.0.9"),
        ("v9.0.0", "nothing of"),
        ("v0.2", "a tag is"),
        ("v0.2x0", "a tag is"),
    ],
)
def test_no_notes_no_release(tag, why):
    with pytest.raises(ValueError, match=why):
        notes(tag, TEXT)


def test_the_command_and_the_workflow():
    done = subprocess.run([sys.executable, "docs/release_notes.py", "v0.1.0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("First version")
    assert "docs/release_notes.py" in (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
