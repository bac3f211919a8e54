"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from l3ms.runs.whole_files import write_json, write_whole


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a loss of power a name without contents would be left."""
    events = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor):
        events.append(("flushed", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def named(path, target):
        events.append(("named", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", named)
    write_whole(tmp_path / "text", "twelve bytes")
    assert events == [("flushed", 12), ("named", "text")]
    assert (tmp_path / "text").read_text() == "twelve bytes"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_json(tmp_path / "report.json", {"loss": 1.0})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "report.json", {"loss": 2.0})
    assert (tmp_path / "report.json").read_text() == '{\n  "loss": 1.0\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
