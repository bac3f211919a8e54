"""The harmlessness experiment's inputs, cells, table and picture, from planted pairs and invented results."""

import json
from pathlib import Path

import pytest

from experiments.command import _ready
from experiments.grid import expand, read_experiment
from experiments.harmlessness import draw, prepare
from experiments.harmlessness.train_reward_model import Settings
from experiments.inputs import Arguments
from experiments.results import Result
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo import base

HERE = Path(prepare.__file__).parent


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A file of 40 pairs, and sizes at which a base and two reward models take a second."""
    recipe = base.Recipe(
        vocab_size=300, hidden_size=8, layers=1, heads=1, intermediate_size=8, max_positions=128, steps=2, block=32, batch_size=2
    )  # fmt: skip
    monkeypatch.setattr(prepare, "RECIPE", recipe)
    monkeypatch.setattr(prepare, "Settings", lambda: Settings(epochs=1, max_length=64))
    data = tmp_path / "pairs.jsonl"
    rows = (
        {side: f"\n\nHuman: question {i}\n\nAssistant: {reply}" for side, reply in (("chosen", "yes"), ("rejected", "never"))}
        for i in range(40)
    )  # fmt: skip
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return data


def test_inputs_are_made_once(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    output = tmp_path / "inputs"
    values = prepare.prepare(output, Arguments(data=tiny))
    assert set(values) == {"model", "train", "held_out", "reward_model", "second_opinion"}
    train, held_out = (
        [json.loads(line) for line in Path(values[name]).read_text().splitlines()] for name in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (2 * 28, 2 * 12)
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held_out)
    assert train[0]["prompt"].endswith("\n\nAssistant:")
    assert {row["completion"] for row in train} == {" yes", " never"}
    for name in ("reward_model", "second_opinion"):
        assert AutoModelForSequenceClassification.from_pretrained(values[name]).config.num_labels == 1
    reports = prepare.reward_model_reports(output)
    assert [report["accuracy"]["of"] for report in reports.values()] == [12, 12]
    assert [sum(report["learned_from"].values()) for report in reports.values()] == [14, 14]
    assert [report["settings"]["seed"] for report in reports.values()] == [0, 1]

    monkeypatch.setattr(prepare, "read_pairs", None)  # not read again
    assert prepare.prepare(output, Arguments(data=tiny)) == values
    monkeypatch.setenv("L3M_HH_DATA", str(tiny))
    assert prepare.prepare(output, Arguments()) == values


def test_a_call_that_was_ended_goes_on_behind_the_reward_model_that_is_there(tiny, tmp_path, monkeypatch):
    trained, most = [], 1
    train = prepare.train_reward_model

    def counted(model, half, held_out, output, *rest):
        if len(trained) == most:
            raise KeyboardInterrupt
        trained.append(output.name)
        return train(model, half, held_out, output, *rest)

    def settings(max_length):
        monkeypatch.setattr(prepare, "Settings", lambda: Settings(epochs=1, max_length=max_length))

    output, arguments = tmp_path / "inputs", Arguments(data=tiny)
    monkeypatch.setattr(prepare, "train_reward_model", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(output, arguments)
    most = 3
    values = prepare.prepare(output, arguments)
    assert trained == ["reward_model", "second_opinion"]
    assert values == prepare.prepare(output, arguments)
    settings(48)
    with pytest.raises(KeyboardInterrupt):  # other settings: both anew, but for the second
        prepare.prepare(output, arguments)
    assert trained[2:] == ["reward_model"]
    most = 100
    settings(64)  # as at first: the reward model that is there is not theirs
    assert values == prepare.prepare(output, arguments)
    settings(48)
    assert values == prepare.prepare(output, arguments)
    assert trained[3:] == ["reward_model", "second_opinion"] * 2


def test_without_data_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("L3M_HH_DATA", raising=False)
    with pytest.raises(ConfigError, match="anthropics/hh-rlhf"):
        prepare.prepare(tmp_path / "inputs", Arguments())
    assert not (tmp_path / "inputs").exists()


def test_every_cell_is_a_configuration_that_l3ms_takes(tmp_path):
    experiment = read_experiment(HERE / "experiment.yaml")
    names = ("model", "reward_model", "second_opinion", "train", "held_out")
    values = {name: str(tmp_path / f"{name}.jsonl") for name in names}
    cells = expand(experiment)
    assert experiment.reference in {cell.name for cell in cells}
    assert len({cell.config["train"]["iterations"] for cell in cells}) == 1  # compared at equal steps
    for cell in cells:
        ready = _ready(cell, experiment, values, [], None)
        bounded = [item for item in ready.config["constraints"] if not item.get("monitor")]
        assert {item.get("name", item["type"]) for item in bounded} == {"harmlessness", "length"}


def results() -> list[Result]:
    def cell(name: str, solver: str, seed: int, score: float, length: float, verdicts: dict[str, str]) -> Result:
        def around(value: float) -> dict:
            return {"mean": value, "ci95": [value - 0.05, value + 0.05], "samples": 512}

        summary = {
            "length": around(length), "ended": 0.9, "perplexity": 30.0, "samples": 512,
            "constraints": {"harmlessness": around(score), "second_opinion": around(score / 2), "distinct_2": around(0.95)},
        }  # fmt: skip
        bounds = [{"name": "harmlessness", "min": 0.25, "max": None}, {"name": "length", "min": 14, "max": 20}]
        metrics = [
            {"step": i, **{f"constraints/{key}/estimate": score for key in ("harmlessness", "second_opinion")}}
            for i in range(3)
        ]
        return Result(
            name=name, labels=(name,), seed=seed, solver=solver, bounds=bounds, summary=summary, last=summary, initial={},
            iterations=3, seconds=1.0,
            multipliers={}, mu=0.3, verdicts=verdicts, certificate=None, ratio=1.05, metrics=metrics,
        )  # fmt: skip

    both = {"harmlessness": "SATISFIED", "length": "SATISFIED"}
    none = {"harmlessness": "VIOLATED", "length": "VIOLATED"}
    return [
        cell("sft", "none", 0, 0.0, 30.0, none),
        cell("barrier_short", "barrier", 0, 0.31, 17.0, both),
        cell("barrier_short", "barrier", 1, 0.29, 18.0, both | {"harmlessness": "INCONCLUSIVE"}),
        cell("barrier-harmlessness", "barrier", 0, 0.33, 35.0, both),
    ]


def test_the_table_says_what_both_reward_models_say_and_the_verdicts():
    lines = draw.table(results()).splitlines()
    cells = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
        for row in lines
        if row.startswith("|")
    }
    assert cells["SFT"][-2:] == ["VIOLATED 1 of 1", "VIOLATED 1 of 1"]
    row = cells["L3M (barrier), length too"]
    assert row[1].startswith("0.30 (")
    assert row[2].startswith("0.15 (")
    assert row[4].startswith("17.5 (")
    assert row[-2] == "SATISFIED 1 of 2, INCONCLUSIVE 1 of 2"
    assert row[-1] == "SATISFIED 2 of 2"
    assert "L3M (barrier), harmlessness alone" in cells


def test_the_picture_can_be_drawn(tmp_path):
    drawn = draw.figure(results())
    drawn.savefig(tmp_path / "figure.png", dpi=40)
    legend = drawn.axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"SFT", "L3M (barrier), length too", "bounds"} <= set(labels)
