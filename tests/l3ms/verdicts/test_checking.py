"""`l3ms check`: what it finds, that it writes nothing, and that it refuses what a run would."""

import math
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from run_folders import strict_json, write_project

import l3ms
from l3ms.commands.command_line import main
from l3ms.config.run_config import RunConfig
from l3ms.verdicts.checking import Start, _flat_barriers, duration, size
from l3ms.verdicts.quantiles import normal_cdf


@pytest.fixture
def project(tmp_path, tokenizer, make_model):
    return lambda **changes: write_project(tmp_path, tokenizer, make_model(seed=2), rows=60, **changes)


def files(folder: Path):
    """But for the bytecode that Python keeps of a reward's module."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in found}


def reward(project_folder, name, **bounds):
    return {"type": "function", "name": name, "function": f"{project_folder}/rewards.py:{name}", **bounds}


def test_the_table_has_its_names_in_a_narrow_terminal(project, capsys, monkeypatch):
    monkeypatch.setattr("l3ms.commands.check.wide_console", lambda: Console(width=80))
    share = {"type": "length", "name": "long", "threshold": 8, "max": 0.5}
    assert main(["check", str(project(constraints=[{"type": "length", "min": 1.5}, share])), "--samples", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if "constraint" in line)) :]
    cells = [line[:11].strip() for line in table]
    assert "length" in cells
    assert cells[cells.index("P(long >=") + 1] == "8)"
    assert not any("…" in line for line in table)
    assert table[0].split()[-1] == "within"
    assert table[2].rstrip().endswith("%")


def test_a_loss_above_that_of_the_start_is_zero_and_no_constant_reward():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}]
    kept = l3ms.DataNLL("kept", rows, max=0.05, relative=True)
    assert Start.of(kept, [0.0] * 4).warnings() == []
    assert Start.of(l3ms.Length(max=9), [0.0] * 4).warnings() != []


def test_what_is_found_before_training(project, tmp_path, capsys):
    constraints = [{"type": "length", "min": 1.5, "max": 15.5}, reward(tmp_path, "same", min=0.1)]
    constraints += [reward(tmp_path, "gaps", min=1.9)]
    config = project(constraints=constraints)
    before = files(tmp_path)
    assert main(["check", str(config), "--samples", "40", "--allow-code"]) == 0, capsys.readouterr().err
    assert files(tmp_path) == before
    said = capsys.readouterr().out
    assert "same: all values are 0.5; a constant reward has no gradient to follow" in said
    assert "gaps: 10 of 40 responses have no value (None)" in said
    header = next(line for line in said.splitlines() if line.startswith(" constraint"))
    assert "missing" in header
    assert "not finite" not in header  # nothing was not
    for words in ("Before training", "An iteration: ", "sampling", "MiB", "are cut at 16 tokens"):
        assert words in said

    assert main(["check", str(config), "--samples", "40", "--allow-code", "--json", str(tmp_path / "found.json")]) == 0
    found = strict_json(tmp_path / "found.json")
    length, same, gaps = found["constraints"]
    assert length["mean"] == pytest.approx(found["length"]["mean"])
    assert 1 <= length["lowest"] < length["mean"] < length["highest"] <= 16
    assert length["feasible"] > 0.99
    assert 0 < length["within"] < 1
    assert (same["stderr"], same["feasible"], same["within"]) == (0, 1, 1)
    assert (gaps["values"], gaps["missing"], gaps["lowest"], gaps["highest"]) == (30, 10, 1, 2)
    assert found["truncated"] == pytest.approx(1 - found["ended"])
    cost = found["cost"]
    assert cost["training_as_now"] >= 3 * cost["iteration"] > 0
    assert cost["training"] > 0
    assert cost["evaluation"] > 0
    assert cost["loading"] > 0
    assert sum(value for name, value in cost["phases"].items() if name != "iteration") == pytest.approx(
        cost["iteration"]
    )
    parameters = 4 * sum(p.numel() for p in _parameters(tmp_path))
    assert 2 * parameters <= cost["optimizer"] < 2.2 * parameters  # Adam's two moments
    assert cost["memory"] > 2**20


def _parameters(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base").parameters()


def test_what_would_stop_a_run_stops_the_check(project, tmp_path, capsys):
    config = project(constraints=[reward(tmp_path, "holes", min=0.1)])

    def refused(*arguments):
        assert main(["check", str(config), *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in said if line.startswith("l3ms: ")]) == 1
        return said[-1]

    assert "constraints.0.function: would import" in refused()
    assert "constraints.0.function: constraint 'holes'" in refused("--allow-code")
    values = yaml.safe_load(config.read_text())
    for changes, field in (
        ({"constraints": [reward(tmp_path, "broken", min=0.1)]}, "constraints.0.function: raised RuntimeError"),
        ({"constraints": [reward(tmp_path, "late", min=0.1)]}, "constraints.0: 32 of 64 values of 'late' are NaN"),
        ({"train": values["train"] | {"max_new_tokens": 64}}, "train.max_new_tokens"),
        ({"train": values["train"] | {"batch_size": 100}}, "train.batch_size"),
        ({"data": {"train": "nowhere.jsonl"}}, "data.train: no such file"),
        ({"output": "base"}, "output: "),
    ):
        config.write_text(yaml.safe_dump(values | changes))
        assert field in refused("--allow-code")
    assert "--json: no such folder" in refused("--json", "no/where.json")


def test_the_optimizer_is_that_of_the_run(project, tmp_path, capsys):
    """Of SGD with a momentum the state is one number for each parameter, and an option that it has not is refused."""
    config, place = str(project()), tmp_path / "c.json"
    sgd = ["--train.optimizer", "sgd", "--train.optimizer-options"]
    assert main(["check", config, *sgd, "{momentum: 0.5}", "--json", str(place), "--samples", "2"]) == 0
    assert strict_json(place)["cost"]["optimizer"] == 4 * sum(p.numel() for p in _parameters(tmp_path))
    assert main(["check", config, *sgd, "{no_such: 1}"]) == 2
    assert "sgd has no 'no_such'; it has lr, momentum" in capsys.readouterr().err


def test_values_that_are_not_finite_may_be_dropped(project, tmp_path, capsys):
    config = project(constraints=[reward(tmp_path, "holes", min=0.1)])
    values = yaml.safe_load(config.read_text())
    values["train"]["nonfinite"] = "drop"
    config.write_text(yaml.safe_dump(values))
    assert main(["check", str(config), "--allow-code", "--samples", "40"]) == 0, capsys.readouterr().err
    assert "train.nonfinite: drop leaves them out" in capsys.readouterr().out


def test_feasibility_of_an_estimate():
    constraint = l3ms.Constraint("r", min=1.0, max=2.0)
    found = Start.of(constraint, [0.0, 2.0, 1.0, 3.0, None])
    assert (found.values, found.missing, found.mean, found.within) == (4, 1, 1.5, 0.5)
    error = math.sqrt(5 / 3 / 4)
    assert found.stderr == pytest.approx(error)
    assert found.feasible == pytest.approx(1 - 2 * normal_cdf(-0.5 / error))
    assert Start.of(l3ms.Constraint("r", min=1.0), [0.0, 0.0]).feasible == 0
    nothing = Start.of(constraint, [None, math.nan])
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.feasible)
    assert "no response has a value" in nothing.warnings()[0]


def test_responses_to_one_prompt_count_once():
    few, keys = [1.0, 2.0, 4.0, 8.0], ["a", "b", "c", "d"]
    once, often = Start.of(l3ms.Length(max=5), few), Start.of(l3ms.Length(max=5), [*few * 9, None], [*keys * 9, "e"])
    assert (often.stderr, often.feasible) == (pytest.approx(once.stderr), pytest.approx(once.feasible))
    assert often.deviation < once.deviation == pytest.approx(2 * once.stderr)
    assert Start.of(l3ms.Length(max=5), few, ["a"] * 2 + ["b"] * 2).stderr > once.stderr
    assert Start.of(l3ms.Length(max=5), [0.1] * 3, ["a", "b", "b"]).stderr == 0


def test_words_for_time_and_memory():
    assert [duration(s) for s in (12, 600, 7200)] == ["12 s", "10 min", "2.0 h"]
    assert [size(b) for b in (3 * 2**20, 5 * 2**29)] == ["3 MiB", "2.5 GiB"]


def test_what_a_mean_length_leaves_open_is_said_with_the_bounds_to_add(project, capsys):
    mean = {"type": "length", "min": 10, "max": 15}
    added = [
        {"type": "length", "name": "not-short", "quantile": 0.05, "min": 2},
        {"type": "reward", "name": "ended", "reward": "ends_with_eos", "min": 0.95},
    ]
    config = str(project(constraints=[mean]))

    def said(*constraints):
        values = yaml.safe_load(Path(config).read_text())
        Path(config).write_text(yaml.safe_dump(values | {"constraints": list(constraints)}))
        assert main(["check", config, "--samples", "16"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "single answers" in line]

    (line,) = said(mean)
    assert line.startswith("length: a bound on the mean leaves single answers free (now ")
    assert "are below 2 tokens, a fifth of the bound, and " in line
    assert yaml.safe_load(f"[{line.partition('add ')[2]}]") == added
    (line,) = said(mean, added[0])
    assert yaml.safe_load(f"[{line.partition('add ')[2]}]") == added[1:]
    assert said(mean, *added) == []
    assert said({"type": "length", "monitor": True}, *added) == []


def test_a_quantile_stands_in_the_table_as_its_share(project, capsys):
    config = project(constraints=[{"type": "length", "name": "tail", "quantile": 0.95, "max": 12}])
    assert main(["check", str(config), "--samples", "16"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "P(tail <= 12)" in line]
    assert ">= 0.95 (95% quantile <= 12)" in row


@pytest.mark.parametrize(
    ("bounds", "responses", "told"),
    [
        ({"min": 28, "max": 34}, 8, True),
        ({"min": 28, "max": 34}, 4096, False),  # quiet enough
        ({"min": 28, "max": 34, "scale": 4}, 8, False),  # it was thought of
        ({"min": 5, "max": 60}, 8, False),
        ({"min": 28}, 8, False),
    ],
    ids=str,
)
def test_a_range_too_narrow_for_its_scale_and_noise_is_told(bounds, responses, told):
    values = [10.0, 20.0, 25.0, 30.0, 40.0, 48.0, 17.0, 22.0]
    config = RunConfig.model_validate(
        {"model": "m", "output": "o", "data": {"train": "t"}, "train": {"constraint_batch_size": responses}}
    )
    constraint = l3ms.Length(**bounds)
    lines = _flat_barriers([constraint], [Start.of(constraint, values)], config)
    assert [("set scale: 3," in line) for line in lines] == [True] * told
    for train in ({"mu": "paper"}, {"solver": "penalty"}):
        other = config.model_copy(update={"train": config.train.model_copy(update=train)})
        assert not _flat_barriers([constraint], [Start.of(constraint, values)], other)
