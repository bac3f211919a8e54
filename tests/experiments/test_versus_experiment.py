"""The comparison with other libraries: its grid, its cells, what a certificate costs, the command; nothing is trained."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.versus import contest as contests
from experiments.versus.contest import Cell
from experiments.versus.outcomes import Cost, Result, outcomes, read_results, tuned
from experiments.versus.running import cell_folder, is_finished, run_cells
from experiments.versus.table import table
from experiments.versus.task import Task
from l3ms.config.yaml_reader import ConfigError

HERE = Path(contests.__file__).parent
GRID = contests.read_contest(HERE / "grid.yaml")
TASK: dict[str, Any] = {"model": "m", "train": "t", "held_out": "h"}


def made(only: str | None = None, folder: Path = Path("/out"), seeds=(0,), **task: Any) -> list[Cell]:
    return contests.cells(GRID, contests.chosen(GRID, only), {**TASK, **task}, folder, seeds)


def test_every_contestant_of_the_grid_is_a_file_that_trains():
    for cell in made():
        module = importlib.import_module(f"experiments.versus.{cell.values['module']}")
        assert callable(module.train)
        assert isinstance(cell.values["task"]["learning_rate"], float)


def test_cells_share_the_level_and_know_where_they_go_on():
    cells = {cell.key: cell for cell in made("trl_grpo,l3m", iterations=7)}
    assert {key.split("/")[0] for key in cells} == {"sft", "l3m", "trl_sft", "trl_grpo"}  # the reference, and the start
    grpo = cells["trl_grpo/beta-0.2/seed-0"]
    assert grpo.values["judge"]["looks"] == 4
    assert cells["l3m/defaults/seed-0"].values["judge"]["looks"] == 3
    assert grpo.after == "trl_sft/plain/seed-0"
    assert grpo.values["task"]["start"] == "/out/cells/trl_sft/plain/seed-0/work/weights"
    task, setting = Task(**cells["trl_grpo/beta-0/seed-0"].values["task"]).with_setting(
        {"beta": 0.0, "learning_rate": 1e-4, "times": 3}
    )
    assert (task.learning_rate, task.iterations, setting) == (1e-4, 21, {"beta": 0.0})


def test_refused_before_anything_runs(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"--only: no contestant is called 'ppo'; there are sft, l3m, "):
        made("ppo")
    with pytest.raises(ConfigError, match=r"task: .*'tokens'"):
        made(tokens=3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r'cooper_loop: needs cooper, which is not installed: pip install "\.\[versus\]"'
    ) as refused:
        contests.check_installed(GRID, list(GRID.contestants))
    assert "--only sft,l3m,lagrangian,trl_sft" in str(refused.value)
    contests.check_installed(GRID, ["sft", "l3m", "filtered_sft"])
    path = tmp_path / "grid.yaml"
    path.write_text("title: t\nreference: a\ncontestants: {a: {title: A, after: b, tries: {x: {}}}}\n")
    with pytest.raises(ConfigError, match=r"contestants.a.after: no contestant is called 'b'"):
        contests.read_contest(path)


def test_runs_go_on_and_tell_what_failed(tmp_path):
    ran = []

    def command(words, log, environment):
        place = Path(words[-1])
        cell = json.loads((place / "cell.json").read_text())
        ran.append((place.parent.parent.name, (place / "trained.json").exists()))
        log.write_text("Traceback\nValueError: no luck\n")
        if cell["module"] == "trl_sft" and cell["task"]["iterations"] == 3:
            return 1
        (place / "work").mkdir(exist_ok=True)
        (place / "trained.json").write_text('{"weights": "work"}')
        certified = cell["setting"].get("beta") == 0.04 and cell["task"]["iterations"] == 5
        (place / "result.json").write_text(json.dumps({"verdict": "SATISFIED" if certified else "VIOLATED"}))
        return 0

    def go(cells, **options):
        ran.clear()
        return run_cells(cells, tmp_path, jobs=1, console=Console(quiet=True), command=command, **options)

    cells = made("trl_grpo", tmp_path, iterations=3)
    errors = go(cells)
    assert errors["trl_sft/plain/seed-0"] == "ended with exit code 1: ValueError: no luck"
    assert errors["trl_grpo/beta-0.2/seed-0"] == "trl_sft/plain/seed-0 has failed"
    assert [name for name, _ in ran] == ["trl_sft", "sft"]  # what others go on from comes first
    cells = made("trl_grpo", tmp_path, iterations=4)
    assert go(cells) == {}
    assert len(ran) == 6
    assert not any(trained for _, trained in ran)  # of another number of iterations: begun anew
    assert go(cells) == {}
    assert ran == []
    (cell_folder(tmp_path, cells[0]) / "result.json").unlink()
    assert not is_finished(cells[0], tmp_path)
    assert go(cells) == {}
    assert ran == [("sft", True)]  # judged again, not trained again
    cells = made("trl_grpo", tmp_path, iterations=5)
    assert go(cells, first=True) == {}
    assert [name for name, _ in ran] == ["trl_sft", "sft", "trl_grpo"]  # whose first try is certified
    assert go(cells) == {}
    assert len(ran) == 3


def result(cell: Cell, verdict: str, perplexity: float, seconds: float = 60.0) -> Result:
    judged = {
        "verdict": verdict, "perplexity": perplexity, "sampled_tokens": 500, "seconds": 30.0, "length": {"mean": 14.0},
        "lower": 13.0, "upper": 15.0, "few": 0.0, "cut": 0.25, "machine": "new", "samples": 50,
        "certificate": {"bounds": [{"more": None}, {"more": 1950 if verdict == "INCONCLUSIVE" else None}]},
    }  # fmt: skip
    trained = {"sampled_tokens": 1000, "seconds": seconds, "machine": "old" if cell.attempt == "scale-2" else "new"}
    return Result(cell.contestant, cell.attempt, cell.seed, {}, trained, judged, ratio=perplexity / 10)


def test_a_certificate_costs_all_tries_before_it():
    cells = made("trl_grpo,l3m")
    verdicts = {
        "beta-0.04-slow": ("SATISFIED", 14.0),
        "beta-0.2": ("SATISFIED", 12.0),
        "defaults": ("INCONCLUSIVE", 11.0),
    }
    results = [result(cell, *verdicts.get(cell.attempt, ("VIOLATED", 20.0))) for cell in cells]
    found = {item.contestant: item for item in outcomes(cells, results)}
    grpo = found["trl_grpo"]
    assert grpo.certified
    # Fine-tuning counts once, without its verdict
    assert grpo.to_certificate == Cost(tries=2, training_tokens=2000, judging_tokens=1000, seconds=60 + 2 * 90)
    assert grpo.all_tries == Cost(tries=4, training_tokens=4000, judging_tokens=2000, seconds=60 + 4 * 90)
    assert (grpo.first_ratio, grpo.best_ratio, grpo.best) == (1.4, 1.2, "beta-0.2")
    assert not found["l3m"].certified
    assert (found["l3m"].to_certificate.tries, found["l3m"].first_ratio) == (3, None)
    text = table(GRID, cells, results, list(found.values()))
    assert (
        "| TRL SFT, then GRPO with a length penalty | yes | 2 | 4 | 2.0 + 1.0 | 4.0 | 1.400 | 1.200 | 4.0 + 2.0 | 7.0 | - | - |"
        in text
    )
    assert "| L3M (barrier) | no | 3 | 3 | 3.0 + 1.5 | 4.5 | - | - | 3.0 + 1.5 | 4.5 | - | - |" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines() if "| L3M (barrier) |" in line][1:] == [
        "a",
        "ab",
        "a",
    ]
    assert "| defaults | 14.0 (13.0 to 15.0) | INCONCLUSIVE | 2,000 | 11.00 |" in text
    assert "| beta-0.2 | 14.0 (13.0 to 15.0) | SATISFIED | 50 | 12.00 |" in text
    assert "machines are not the same thing: a is new, b is old." in text
    for left_out, known in (
        ("beta-0", ["sft", "l3m", "trl_sft", "trl_grpo"]),
        ("beta-0.04", ["sft", "l3m", "trl_sft"]),
    ):
        unfinished = outcomes(cells, [item for item in results if item.attempt != left_out])
        assert [item.contestant for item in unfinished] == known  # the tries up to the certificate are there, or not
        assert all((item.all_tries is None) == (item.contestant == "trl_grpo") for item in unfinished)


def test_a_ratio_is_over_the_reference_that_learnt_from_the_same_rows(tmp_path):
    cells = made("l3m", tmp_path, seeds=(0, 1))
    for cell, rows in zip(cells, ("a", "a", "b", None, *"aaaa"), strict=True):
        place = cell_folder(tmp_path, cell)
        place.mkdir(parents=True)
        (place / "cell.json").write_text(json.dumps(cell.values))
        (place / "trained.json").write_text(json.dumps({"machine": "m"} | ({"rows": rows} if rows else {})))
        (place / "result.json").write_text(json.dumps({"perplexity": 10.0 + cell.seed}))
    assert [item.ratio for item in read_results(cells, tmp_path, "sft")] == [1.0, 1.0, None, None, 1.0, 1.0, 1.0, 1.0]


def test_the_best_try_is_the_cheapest_certified_one_or_the_nearest():
    cells = made("trl_grpo,l3m", max=13.0)  # every mean is 14
    verdicts = {"beta-0.04-slow": ("SATISFIED", 14.0), "beta-0.2": ("SATISFIED", 12.0)}
    results = [result(cell, *verdicts.get(cell.attempt, ("VIOLATED", 20.0))) for cell in cells]
    for item in results:
        if (item.contestant, item.attempt) == ("l3m", "scale-2"):
            item.judged["length"] = {"mean": 13.25}
    expected = {"sft": "plain", "trl_sft": "plain", "trl_grpo": "beta-0.2", "l3m": "scale-2"}
    assert tuned(cells, results) == expected
    left = tuned(cells, [item for item in results if item.attempt != "faster"])
    assert left == {name: attempt for name, attempt in expected.items() if name != "l3m"}  # it may be the best yet
    again = contests.cells(GRID, list(expected), TASK, Path("/out"), [5, 6], expected)
    assert [cell.key for cell in again if cell.contestant == "trl_grpo"] == [
        "trl_grpo/beta-0.2/seed-5", "trl_grpo/beta-0.2/seed-6"
    ]  # fmt: skip
    assert len(again) == 8
    assert {cell.values["judge"]["looks"] for cell in again} == {1}


def test_the_command_leaves_tables_and_says_what_did_not_finish(tmp_path, monkeypatch, capsys):
    from experiments.versus import run as command

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(20)))
    failing, seeds = set(), []

    def run_cells(cells, folder, *, jobs, console, first):
        assert (jobs, first) == (2, False)
        seeds.append({cell.seed for cell in cells})
        for cell in cells:
            assert cell.values["task"]["iterations"] == 5
            assert cell.values["judge"]["samples"] == 64
            if cell.attempt not in failing:
                place = cell_folder(folder, cell)
                place.mkdir(parents=True, exist_ok=True)
                known = result(cell, "SATISFIED", 9.0 if cell.attempt == "scale-2" else 10.0)
                for name, value in (("cell", dict(cell.values)), ("trained", known.trained), ("result", known.judged)):
                    (place / f"{name}.json").write_text(json.dumps(value))
        return {cell.key: "no luck" for cell in cells if cell.attempt in failing}

    monkeypatch.setattr(command, "run_cells", run_cells)
    words = ["--model", "m", "--data", str(data), "--output", str(tmp_path / "out"), "--only", "filtered_sft,l3m"]
    words += ["--seeds", "3,4,5", "--iterations", "5", "--samples", "64"]
    assert command.run([*words, "--seeds", "three"]) == 2
    assert "--seeds: wanted whole numbers" in capsys.readouterr().err
    assert command.run(words) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert seeds == [{3}, {4, 5}]
    assert "Tuned with seed 3" in text
    again = "| 2 of 2 | 1.000 |"
    assert f"| SFT on filtered rows | yes | 1 | 4 | 1.0 + 0.5 | 1.5 | 1.000 | 1.000 | 4.0 + 2.0 | 6.0 {again}" in text
    assert (
        "| L3M (barrier) | yes | 1 | 3 | 1.0 + 0.5 | 1.5 | 1.000 | 0.900 | 3.0 + 1.5 | 4.5 | 2 of 2 | 0.900 |" in text
    )
    assert "certified on 64 fresh responses" in text
    assert "What did not finish" not in text
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(written["cells"]) == 1 + 3 + 4 + 2 * 3
    assert [item["certified"] for item in written["contestants"]] == [True] * 9

    failing.add("within")
    (tmp_path / "out" / "cells" / "filtered_sft" / "within" / "seed-3" / "result.json").unlink()
    assert command.run(words) == 1
    assert "1 of 12 cells failed" in capsys.readouterr().err
    assert "* `filtered_sft/within/seed-3`: no luck" in (tmp_path / "out" / "table.md").read_text()
