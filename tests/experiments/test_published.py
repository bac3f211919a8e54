"""What is published is enough to go on from on another machine, and only where settings and data are the same."""

import functools
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import command, published
from experiments.cells import run_cells
from experiments.grid import Cell
from experiments.results import read_results

EXPERIMENT = """\
title: t
reference: x
certify: {samples: 16}
base: {model: "${model}", data: {train: "${train}"}, constraints: [{type: length, max: 9}]}
grid: [{axes: [{x: {}, y: {train.iterations: 7}}]}]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of an experiment `real/a` of the test's own, in the working folder's experiments/."""
    place = tmp_path / "experiments" / "real" / "a"
    place.mkdir(parents=True)
    (place / "experiment.yaml").write_text(EXPERIMENT)
    modules = {"experiments.real.a.draw": importlib.import_module("experiments.length.draw")}
    monkeypatch.setattr(command, "ROOT", tmp_path / "experiments")
    monkeypatch.setattr(command.importlib, "import_module", modules.__getitem__)
    monkeypatch.chdir(tmp_path)
    return place


@pytest.fixture
def run(tmp_path, fake_command, monkeypatch):
    """`run(output, *words)`: the cells that were trained."""

    def train(output: str, *words: str, text: str = "a") -> list[str]:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(f'{{"prompt": "{text}{i}", "completion": "b"}}\n' for i in range(9)))
        fake = fake_command()
        monkeypatch.setattr(command, "run_cells", functools.partial(run_cells, command=fake))
        assert command.run(["real/a", "--model", "m", "--data", str(data), "--output", output, *words]) == 0
        return sorted(cell for what, cell in fake.calls if what == "train")

    return train


def test_another_machine_goes_on(place, run):
    assert run("one", "--only", "x", "--publish") == ["x/seed-0"]
    assert "`y/seed-0`" not in (place / "results" / "table.md").read_text()  # it was not wanted
    assert run("two", "--go-on", "--publish") == ["y/seed-0"]
    cells = json.loads((place / "results" / "results.json").read_text())["cells"]
    assert [(cell["name"], cell["ratio"]) for cell in cells] == [("x", 1.0), ("y", 1.0)]
    assert all(cell["machine"] and cell["identity"] for cell in cells)
    assert run("three", "--go-on", "--draw") == []
    assert Path("three/table.md").read_text() == (place / "results" / "table.md").read_text()
    assert run("four") == ["x/seed-0", "y/seed-0"]  # nobody asked for what is published


def test_what_has_other_settings_or_other_data_is_run(place, run):
    run("one", "--publish")
    assert run("two", "--go-on", text="other") == ["x/seed-0", "y/seed-0"]
    assert run("three", "--go-on", "--samples", "8") == ["x/seed-0", "y/seed-0"]
    (place / "experiment.yaml").write_text(EXPERIMENT.replace("iterations: 7", "iterations: 8"))
    assert run("four", "--go-on") == ["y/seed-0"]
    (place / "results" / "runs.jsonl").unlink()
    assert run("five", "--go-on") == ["x/seed-0", "y/seed-0"]


def test_what_is_drawn_comes_back(tmp_path, finished):
    cells = [Cell(name, (name, "12-16"), 0, {"seed": 0}, 16, f"identity of {name}") for name in ("sft", "mean")]
    finished(tmp_path, cells[0], solver="none", sampled=[8])
    finished(tmp_path, cells[1], verdict="SATISFIED", initial=True, sampled=[8, 9])
    results = read_results(cells, tmp_path, "sft")
    results[1].metrics[0]["time/task"] = 1.0  # is not drawn
    results[1] = replace(results[1], examples=[{"prompt": "p", "average": "text\u2028of two lines"}])
    published.write(results, tmp_path, {"title": "t"})
    found = published.read(tmp_path, [*cells, replace(cells[0], name="other")])
    del results[1].metrics[0]["time/task"]
    certificate = {key: value for key, value in (results[1].certificate or {}).items() if key != "run"}
    results[1] = replace(results[1], certificate=certificate)
    for result in results:
        again = found.pop(result.key)
        assert replace(again, metrics=[]) == replace(result, metrics=[])
        for row, wanted in zip(again.metrics, result.metrics, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)
    assert not found
    published.write(results, tmp_path, {}, texts=False)
    assert "text" not in (tmp_path / published.RUNS).read_text()


def test_an_identity_is_of_contents_and_not_of_paths_or_machines(tmp_path):
    for folder, text in (("a", "rows"), ("b", "rows"), ("c", "others")):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "train.jsonl").write_text(text)
        (tmp_path / folder / "model" / "model.safetensors").write_text(text)

    def of(folder: str, **values: object) -> str:
        names = {"train": str(tmp_path / folder / "train.jsonl"), "model": str(tmp_path / folder / "model")}
        contents = published.contents(names | {"here": str(tmp_path / folder)} | values)
        return published.identity({"train": "${train}"}, 16, contents)

    assert of("a") == of("b", bfloat16=True)
    assert of("c") != of("a")
    assert of("a", model=str(tmp_path / "c" / "model")) != of("a")
    assert of("a", rate=0.1) != of("a", rate=0.2)
