"""Tables and pictures come from run folders alone; the command says what is wrong in one line."""

import importlib
import json
from pathlib import Path

import pytest

from experiments import command, inputs
from experiments.data_files import json_lines
from experiments.grid import Cell
from experiments.presenting import interval, pooled, verdict
from experiments.results import read_results
from l3ms.config.yaml_reader import ConfigError


def cell(name: str, labels: tuple[str, ...] | None = None, seed: int = 0, certify: int | None = 16) -> Cell:
    return Cell(name, labels or (name,), seed, {"seed": seed}, certify)


def module(name):
    return importlib.import_module(f"experiments.{name}.draw")


def is_picture(figure, path):
    figure.savefig(path, dpi=110)
    return path.read_bytes().startswith(b"\x89PNG") and 10_000 < path.stat().st_size < 200_000


def test_pooling(tmp_path, finished):
    cells = [cell("a", seed=seed) for seed in range(4)]
    for item, words in zip(cells, ["SATISFIED"] * 3 + ["INCONCLUSIVE"], strict=True):
        finished(tmp_path, item, mean=14.0 + 2 * item.seed, verdict=words)
    runs = read_results(cells, tmp_path)
    centre, low, high = pooled(runs)
    assert centre == 17.0
    assert (high - low) / 2 == pytest.approx(0.5 / 2)  # four independent intervals of half-width 0.5
    assert interval(runs) == "17.00 (16.75 to 17.25)"
    assert verdict(runs) == "SATISFIED 3 of 4, INCONCLUSIVE 1 of 4"


def test_length(tmp_path, finished):
    sft, low, high, other = cells = [
        cell("sft", certify=None), cell("barrier_12-16", ("barrier", "12-16")), cell("barrier_30-36", ("barrier", "30-36")),
        cell("penalty_12-16", ("penalty", "12-16")),
    ]  # fmt: skip
    finished(tmp_path, sft, solver="none", mean=22.0, perplexity=10.0, bounds=None)
    finished(tmp_path, low, verdict="SATISFIED")
    finished(tmp_path, high, mean=33.0, bounds=(30.0, 36.0), verdict="SATISFIED")
    finished(tmp_path, other, solver="penalty", mean=19.0, verdict="VIOLATED")
    results = read_results(cells, tmp_path, "sft")
    lines = module("length").table(results).splitlines()
    assert lines[2].startswith("| SFT | - | 22.00 (21.50 to 22.50) | 22.0 | 99.0% | 10.00 | 1.000 | - | - |")
    assert lines[3].startswith(
        "| L3M (barrier) | [12, 16] | 14.00 (13.50 to 14.50) | 14.0 | 99.0% | 11.00 | 1.100 | SATISFIED 1 of 1 | 0.05 |"
    )
    assert "VIOLATED 1 of 1" in lines[4]
    assert is_picture(module("length").figure(results), tmp_path / "figure.png")


def test_forgetting(tmp_path, finished):
    cells = [cell("sft"), cell("barrier")]
    options = {"name": "docstrings", "bounds": (None, 3.6), "initial": True}
    finished(tmp_path, cells[0], solver="none", mean=4.2, verdict="VIOLATED", **options)
    finished(tmp_path, cells[1], mean=3.55, verdict="SATISFIED", **options)
    results = read_results(cells, tmp_path, "sft")
    lines = module("forgetting").table(results).splitlines()
    assert lines[2].startswith(
        "| SFT | <= 3.6 | 4.200 (4.100 to 4.300) | 4.200 (4.100 to 4.300) | 4.200 | VIOLATED 1 of 1 |"
    )
    assert "SATISFIED 1 of 1" in lines[3]
    assert is_picture(module("forgetting").figure(results), tmp_path / "figure.png")


def test_ablations(tmp_path, finished):
    sft, default, paper = cells = [
        cell("sft", certify=None), cell("default_12-16", ("default", "12-16")), cell("mu-paper_12-16", ("mu-paper", "12-16")),
    ]  # fmt: skip
    finished(tmp_path, sft, solver="none", bounds=None)
    finished(tmp_path, default, verdict="SATISFIED")
    finished(tmp_path, paper, verdict="INCONCLUSIVE")
    results = read_results(cells, tmp_path, "sft")
    text = module("ablations").table(results)
    assert "| default | [12, 16] | 14.00 (13.50 to 14.50) | 14.00 | 0.4 | 3 to 20 |" in text  # 10/11 - 10/20
    assert is_picture(module("ablations").figure(results), tmp_path / "figure.png")


def test_fewer(tmp_path, finished):
    full, auto = cells = [
        cell("every-1_12-16", ("every-1", "12-16")), cell("every-auto_12-16", ("every-auto", "12-16")),
    ]  # fmt: skip
    finished(tmp_path, full, verdict="SATISFIED", sampled=(100,))
    finished(tmp_path, auto, verdict="SATISFIED", perplexity=11.11, sampled=(100, 0))
    lines = module("fewer").table(results := read_results(cells, tmp_path)).splitlines()
    assert lines[2].endswith("| 11.00 | 1.000 | SATISFIED 1 of 1 | 2,000 | 0% | 1.00 | - |")
    assert lines[3].startswith("| every: auto | [12, 16] | 14.00 (13.50 to 14.50) | 14.0 |")
    assert lines[3].endswith("| 11.11 | 1.010 | SATISFIED 1 of 1 | 1,000 | 50% | 0.50 | - |")
    assert is_picture(module("fewer").figure(results), tmp_path / "figure.png")


def test_far(tmp_path, finished):
    sft, default, separate = cells = [
        cell("sft", certify=None),
        cell("default_at-most-10", ("default", "at-most-10")),
        cell("separate_at-most-10", ("separate", "at-most-10")),
    ]
    finished(tmp_path, sft, solver="none", bounds=None)
    finished(tmp_path, default, bounds=(None, 10.0), verdict="SATISFIED")
    finished(tmp_path, separate, bounds=(None, 10.0), verdict="VIOLATED")
    results = read_results(cells, tmp_path, "sft")
    lines = module("far").table(results).splitlines()
    assert lines[3].startswith("| default | length <= 10 | 20 | 14.00 (13.50 to 14.50) | - |")
    assert lines[3].endswith("SATISFIED 1 of 1 |")
    assert lines[4].startswith("| clipping separate | length <= 10 |")
    assert is_picture(module("far").figure(results), tmp_path / "figure.png")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    inputs.write_rows(path, ({"prompt": f"p{i}", "completion": "c\u2028d"} for i in range(40)))
    return path


def test_inputs_of_a_model_of_ones_own(tmp_path, rows):
    arguments = inputs.Arguments("some/model", rows, rows=30)
    values = inputs.prepare(tmp_path / "inputs", arguments)
    assert values["model"] == "some/model"
    sides = [json_lines(Path(values[side])) for side in ("train", "held_out")]
    assert [len(side) for side in sides] == [30, 4]
    assert not set(sides[0]) & set(sides[1])
    assert {json.loads(row)["completion"] for side in sides for row in side} == {"c\u2028d"}
    Path(values["train"]).write_text("")
    assert inputs.prepare(tmp_path / "inputs", arguments) == values
    assert not json_lines(Path(values["train"]))  # what was there
    inputs.write_rows(rows, ({"prompt": f"p{i}", "completion": "e"} for i in range(40)))  # other rows by the same name
    inputs.prepare(tmp_path / "inputs", arguments)
    assert {json.loads(row)["completion"] for row in json_lines(Path(values["train"]))} == {"e"}
    rows.unlink()
    with pytest.raises(ConfigError, match="--data"):
        inputs.prepare(tmp_path / "inputs", inputs.Arguments("some/model", rows, rows=31))
    with pytest.raises(ConfigError, match="go together"):
        inputs.prepare(tmp_path, inputs.Arguments(model="some/model"))


def test_the_command(tmp_path, rows, fake_command, monkeypatch, capsys):
    fake = fake_command()
    monkeypatch.setattr("experiments.cells.execute", fake)
    monkeypatch.setattr(
        command.run_cells, "__kwdefaults__", {**(command.run_cells.__kwdefaults__ or {}), "command": fake}
    )
    output = tmp_path / "out"
    words = [
        "length",
        "--model",
        "m",
        "--data",
        str(rows),
        "--output",
        str(output),
        "--only",
        "barrier_*",
        "--seeds",
        "0",
    ]
    assert command.run(words) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "cells",
        "figure.png",
        "inputs",
        "results.json",
        "runs.jsonl",
        "table.md",
    ]
    written = json.loads((output / "results.json").read_text())
    assert [item["name"] for item in written["cells"]][:2] == ["sft", "barrier_33-40"]
    assert str(tmp_path) not in (output / "results.json").read_text()
    calls = len(fake.calls)
    assert command.run(words) == 2  # cells are there
    assert "--resume" in capsys.readouterr().err
    assert command.run([*words, "--resume"]) == 0
    assert command.run([*words, "--draw"]) == 0
    assert len(fake.calls) == calls
    fake.failing = {("train", "barrier_33-40/seed-0")}
    assert command.run([*words, "--overwrite"]) == 1
    assert "no such solver" in (output / "table.md").read_text()


def test_an_experiment_below_a_folder_and_packages_that_are_not_there(
    tmp_path, rows, fake_command, monkeypatch, capsys
):
    """A folder of experiments of the test's own: `real/a`."""
    place = tmp_path / "experiments" / "real" / "a"
    place.mkdir(parents=True)
    (place / "experiment.yaml").write_text(
        'title: t\nbase: {model: "${model}", data: {train: "${train}"}, constraints: [{type: length, max: 9}]}\n'
        "grid: [{axes: [{x: {}}]}]\n"
    )
    modules = {"experiments.real.a.draw": module("length")}
    monkeypatch.setattr(command, "ROOT", tmp_path / "experiments")
    monkeypatch.setattr(command.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(
        command.run_cells, "__kwdefaults__", {**(command.run_cells.__kwdefaults__ or {}), "command": fake_command()}
    )
    monkeypatch.chdir(tmp_path)
    words = ["real/a", "--model", "m", "--data", str(rows)]
    output = tmp_path / "out" / "experiments" / "real" / "a"

    assert command.run(words) == 0
    assert (output / "cells" / "x" / "seed-0" / "run" / "report.json").exists()
    (place / "experiment.yaml").write_text(
        f"packages: [json, no_such_package]\n{(place / 'experiment.yaml').read_text()}"
    )
    assert command.run([*words, "--overwrite"]) == 2
    assert "packages: no_such_package cannot be imported: pip install" in capsys.readouterr().err
    assert (output / "results.json").exists()  # nothing was removed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "NAME: 'nothing' is no experiment; there are ablations"),
        (["real"], "NAME: 'real' is no experiment; there are ablations"),
        (["../experiments/length"], "NAME: '../experiments/length' is no experiment"),
        (["length", "--jobs", "0"], "--jobs"),
        (["length", "--seeds", "x"], "--seeds: wanted numbers"),
        (["length", "--only", "x"], "--only: no cell is called 'x'"),
        (["length", "--model", "m"], "--data: --model and --data go together"),
        (["length", "--data", "{rows}", "--model", "m", "--set", "x"], "--set: wanted FIELD=VALUE"),
        (["length", "--data", "{rows}", "--model", "m", "--set", "train.penalti=1"], "cell sft/seed-0, train.penalti"),
        (["length", "--config", "no.yaml"], "no.yaml: no such file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, rows, words, said, capsys):
    words = [word.replace("{rows}", str(rows)) for word in words]
    assert command.run([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "cells").exists()
