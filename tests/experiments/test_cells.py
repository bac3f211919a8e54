"""Cells run once, finished ones are kept, and one that fails does not stop the others."""

import io
import json

import pytest
from rich.console import Console

from experiments.cells import execute, is_trained, run_cells, run_folder
from experiments.grid import Cell
from experiments.results import failed_lines, read_results


def cell(name: str, seed: int = 0, certify: int | None = 16, **fields: object) -> Cell:
    return Cell(name, (name,), seed, {"train": {"iterations": 20}, "seed": seed, **fields}, certify)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def test_train_then_certify(tmp_path, fake_command, console):
    command = fake_command()
    outcomes = run_cells([cell("a"), cell("b", certify=None)], tmp_path, jobs=1, console=console, command=command)
    assert command.calls == [("train", "a/seed-0"), ("certify", "a/seed-0"), ("train", "b/seed-0")]
    assert [(outcome.error, outcome.skipped) for outcome in outcomes] == [(None, False), (None, False)]
    assert int(command.environments[0]["OMP_NUM_THREADS"]) >= 1
    log = (tmp_path / "cells" / "a" / "seed-0" / "log.txt").read_text()
    assert "--samples 16" in log
    assert "--allow-code" not in log
    assert "1/2 a/seed-0 finished, about" in console.file.getvalue()


def test_resume(tmp_path, fake_command, console):
    cells = [cell("a"), cell("b"), cell("c")]
    run_cells(cells, tmp_path, jobs=2, console=console, command=fake_command())
    (run_folder(tmp_path, cells[1]) / "certificate.json").unlink()  # killed before the certificate
    (run_folder(tmp_path, cells[2]) / "report.json").unlink()  # killed in training
    command = fake_command()
    changed = [cells[0], cells[1], cells[2], cell("a", seed=1)]
    outcomes = run_cells(changed, tmp_path, jobs=1, allow_code=True, console=console, command=command)
    assert command.calls == [
        ("certify", "b/seed-0"), ("train", "c/seed-0"), ("certify", "c/seed-0"), ("train", "a/seed-1"), ("certify", "a/seed-1"),
    ]  # fmt: skip
    assert [outcome.skipped for outcome in outcomes] == [True, False, False, False]
    flags = {
        name: "--resume" in (tmp_path / "cells" / name / "log.txt").read_text() for name in ("c/seed-0", "a/seed-1")
    }
    assert flags == {"c/seed-0": True, "a/seed-1": False}


def test_a_changed_configuration_runs_again(tmp_path, fake_command, console):
    run_cells([cell("a")], tmp_path, jobs=1, console=console, command=fake_command())
    other = cell("a", data={"train": "other"})
    assert not is_trained(other, tmp_path)
    command = fake_command()
    run_cells([other], tmp_path, jobs=1, console=console, command=command)
    assert command.calls == [("train", "a/seed-0"), ("certify", "a/seed-0")]


def test_the_report_of_an_older_configuration_is_not_taken_for_that_of_one_that_failed(tmp_path, fake_command, console):
    run_cells([cell("a")], tmp_path, jobs=1, console=console, command=fake_command())
    other = cell("a", data={"train": "other"})
    run_cells([other], tmp_path, jobs=1, console=console, command=fake_command(failing=[("train", "a/seed-0")]))
    assert not is_trained(other, tmp_path)


@pytest.mark.parametrize("stage", ["train", "certify"])
def test_a_failure_is_told_and_the_others_go_on(tmp_path, fake_command, console, stage):
    cells = [cell("a"), cell("b")]
    command = fake_command(failing=[(stage, "a/seed-0")])
    outcomes = run_cells(cells, tmp_path, jobs=1, console=console, command=command)
    assert outcomes[0].error == f"l3ms {stage} ended with exit code 2: l3ms: train.solver: no such solver"
    assert outcomes[1].error is None
    assert "FAILED a/seed-0" in console.file.getvalue()
    lines = failed_lines(cells, read_results(cells, tmp_path), {"a/seed-0": str(outcomes[0].error)})
    assert len(lines) == 1
    assert "no such solver" in lines[0]
    names = [result.name for result in read_results(cells, tmp_path)]
    assert names == (["b"] if stage == "train" else ["a", "b"])


@pytest.mark.parametrize("code", [3, 4])
def test_a_verdict_is_no_failure(tmp_path, fake_command, console, code):
    outcomes = run_cells([cell("a")], tmp_path, jobs=1, console=console, command=fake_command(certify_code=code))
    assert outcomes[0].error is None


def test_execute_keeps_the_output(tmp_path):
    import sys

    log = tmp_path / "log.txt"
    words = [sys.executable, "-c", "import os; print(os.environ['WORD']); raise SystemExit(4)"]
    assert execute(words, log, {"WORD": "hello"}) == 4
    assert log.read_text().splitlines()[-1] == "hello"


def test_results_are_those_of_the_logs(tmp_path, finished):
    cells = [cell("sft", certify=None), cell("a"), cell("b")]
    finished(tmp_path, cells[0], solver="none", perplexity=10.0, bounds=None)
    finished(tmp_path, cells[1], perplexity=11.0, verdict="SATISFIED")
    plain, ours = read_results(cells, tmp_path, "sft")  # b has not run
    assert ours.ratio == pytest.approx(1.1)
    assert (ours.verdicts, ours.bound(), ours.measured("length")[0]) == ({"length": "SATISFIED"}, (12.0, 16.0), 14.0)
    assert ours.multipliers == {"length": 1 / 20}
    assert (plain.ratio, plain.verdicts, plain.bound()) == (1.0, {}, (None, None))
    assert json.loads(json.dumps(ours.summary))["ended"] == 0.99
