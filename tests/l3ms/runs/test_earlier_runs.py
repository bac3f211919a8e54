"""A run that 0.1.0 began and was killed in: `run-of-0.1.0.tar.gz` holds its folder, with the checkpoint of iteration 6."""

import json
import tarfile
from pathlib import Path

import pytest

from l3ms.commands.command_line import main

# What 0.1.0 itself logged, not interrupted. Other instruction sets round otherwise, and may sample another token.
LOSSES = [3.5894, 3.3544, 3.5481, 2.9193, 2.5306, 2.6369, 2.8161, 2.389, 2.7481, 2.664]


def test_it_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("l3ms.rollouts.transformers_engine.Drawn", lambda temperature: None)  # as it drew: in generate
    with tarfile.open(Path(__file__).with_name("run-of-0.1.0.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    project = tmp_path / "run-of-0.1.0"
    assert main(["train", str(project / "run.yaml"), "--resume"]) == 0, capsys.readouterr().err
    assert "Resuming at iteration 6" in capsys.readouterr().out
    lines = [json.loads(line) for line in (project / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[:6]] == pytest.approx(LOSSES[:6], abs=1e-4)  # as they were written
    assert [line["loss"] for line in lines] == pytest.approx(LOSSES, rel=0.05)
    assert main(["certify", str(project / "out"), "--samples", "8"]) in (0, 3, 4)
    assert main(["plot", str(project / "out")]) == 0
