"""The exit codes are those of the one table in SECURITY.md, and what it says of strangers' files is tested where it says."""

import errno
import re
from pathlib import Path

import pytest

from l3ms.commands.ending import Interrupted, explain
from l3ms.config.yaml_reader import ConfigError
from l3ms.ranks.agreement import Disagreement
from l3ms.verdicts.certifying import EXIT_CODES

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "SECURITY.md").read_text()
TABLE = dict(re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TypeError("a fault"), "1"),
        (ConfigError("train.seed", "wrong"), "2"),
        (ValueError("wrong"), "2"),
        (OSError(errno.ENOSPC, "No space left on device"), "5"),
        (RuntimeError("[enforce fail] No space left on device"), "5"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "5"),
        (MemoryError(), "5"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "5"),
        (Disagreement("rank 1"), "5"),
        (Interrupted("interrupted; kept: 2 iterations"), "130"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_what_went_wrong_has_the_code_of_its_kind(error, code):
    line, found = explain(error)
    assert str(found) == code
    assert code in TABLE
    assert line


def test_a_verdict_has_its_code():
    assert set(TABLE) == {"0", "1", "2", "3", "4", "5", "130"}
    for verdict, code in EXIT_CODES.items():
        assert f"{verdict}, " in TABLE[str(code)]


def test_there_is_one_table_of_them():
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert not re.search(r"^\|.*exit code", path.read_text(), re.MULTILINE | re.IGNORECASE), path
    for path in (ROOT / "README.md", ROOT / "docs" / "runs.md", ROOT / "docs" / "method.md"):
        assert "SECURITY.md" in path.read_text(), path


def test_the_tests_that_the_page_names_are_there():
    """And so are those of each claim on the file."""
    named = re.findall(r"`([\w./]+\.py)`", PAGE)
    assert len(set(named)) >= 9
    for name in named:
        path = ROOT / name if name.startswith("tests/") else ROOT / "tests" / "l3ms" / name
        assert name == "torch.py" or path.is_file(), name
