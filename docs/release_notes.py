"""The notes of a release, from CHANGELOG.md: python docs/release_notes.py v0.2.0"""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"


def notes(tag: str, changelog: str) -> str:
    """The section of a version.

    Raises:
        ValueError: a tag that is none, a version that has no section or an empty one, or one that is marked as unreleased.
    """
    found = re.fullmatch(r"v(\d+\.\d+\.\d+)", tag)
    if not found:
        raise ValueError(f"a tag is v and three numbers, as v0.2.0, got {tag!r}")
    section = re.search(rf"^## {re.escape(found[1])}(?P<mark>[^\n]*)\n(?P<text>.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if not section or not section["text"].strip():
        raise ValueError(f"CHANGELOG.md says nothing of {found[1]}: write '## {found[1]} (date)' and what changed")
    if "unreleased" in section["mark"]:
        raise ValueError(f"CHANGELOG.md has {found[1]} as unreleased: give it its date")
    return section["text"].strip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/release_notes.py v0.2.0")
    try:
        sys.stdout.write(notes(sys.argv[1], CHANGELOG.read_text(encoding="utf-8")))
    except ValueError as error:
        sys.exit(f"release_notes: {error}")
