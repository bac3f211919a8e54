"""A grid becomes the cells it says, each with its own configuration; what is wrong with it is said with the field's name."""

from pathlib import Path

import pytest
import yaml

from experiments.grid import Experiment, assign, expand, fill, read_experiment
from l3ms.config.run_config import load_config
from l3ms.config.yaml_reader import ConfigError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
VALUES = {"start": 2.0, "bound": 2.1} | {
    name: f"/{name}.jsonl" for name in ("train", "held_out", "kept", "kept_held_out")
}


def experiment(**fields):
    base = {
        "model": "${model}",
        "output": "out",
        "data": {"train": "${train}"},
        "constraints": [{"type": "length"}],
        "train": {},
    }
    return Experiment.model_validate({"title": "t", "base": base, **fields})


GRID = [
    {"axes": [{"sft": {"train.solver": "none", "constraints": []}}], "certify": None},
    {
        "axes": [
            {"barrier": {}, "penalty": {"train.solver": "penalty"}},
            {"8-11": {"constraints.0.min": 8, "constraints.0.max": 11}, "30": {"constraints.0.min": 30}},
        ],
        "seeds": [5],
    },
]


def test_grid_is_the_product_of_its_axes():
    cells = expand(experiment(grid=GRID, seeds=[0, 1], reference="sft", certify={"samples": 64}))
    assert [cell.key for cell in cells] == [
        "sft/seed-0", "sft/seed-1", "barrier_8-11/seed-5", "barrier_30/seed-5", "penalty_8-11/seed-5", "penalty_30/seed-5",
    ]  # fmt: skip
    assert [cell.certify for cell in cells] == [None, None, 64, 64, 64, 64]
    assert cells[0].config["constraints"] == []
    assert cells[1].config["seed"] == 1
    assert cells[2].config["constraints"] == [{"type": "length", "min": 8, "max": 11}]
    assert cells[3].config["constraints"] == [{"type": "length", "min": 30}]
    assert cells[4].config["train"] == {"solver": "penalty"}
    assert cells[2].config["train"] == {}


def test_seeds_and_only():
    chosen = expand(experiment(grid=GRID, reference="sft"), seeds=[3, 4], only="barrier_*")
    assert {cell.key for cell in chosen} == {
        f"{name}/seed-{seed}" for name in ("sft", "barrier_8-11", "barrier_30") for seed in (3, 4)
    }
    with pytest.raises(ConfigError, match="--only"):
        expand(experiment(grid=GRID), only="nothing")


def test_wrong_grids_are_named():
    with pytest.raises(ConfigError, match="reference: no cell is called 'base'"):
        expand(experiment(grid=GRID, reference="base"))
    with pytest.raises(ConfigError, match=r"grid\.2: cell sft/seed-0 is there twice"):
        expand(experiment(grid=[*GRID, GRID[0]]))
    with pytest.raises(ConfigError, match=r"model\.name"):
        expand(experiment(grid=[{"axes": [{"a": {"model.name": 1}}]}]))


def test_assign():
    values = {"constraints": [{"min": 1}]}
    assign(values, "constraints.0.min", 2)
    assign(values, "constraints.1.max", 3)
    assign(values, "train.lora.r", 4)
    assert values == {"constraints": [{"min": 2}, {"max": 3}], "train": {"lora": {"r": 4}}}
    for field in ("constraints.7", "constraints.5.max", "constraints.x"):
        with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
            assign(values, field, 1)


def test_fill_keeps_types():
    config = {"max": "${bound}", "path": "${here}/rewards.py:f", "pattern": r"\d{3}$", "list": ["${bound}", 1]}
    filled = fill(config, {"bound": 2.5, "here": "/x"})
    assert filled == {"max": 2.5, "path": "/x/rewards.py:f", "pattern": r"\d{3}$", "list": [2.5, 1]}
    with pytest.raises(ConfigError, match=r"\$\{here\}: nothing gives this value; there are bound"):
        fill(config, {"bound": 1})


def test_wrong_file_is_named(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text("title: t\nbase: {}\ngrid: [{axes: []}]\n")
    with pytest.raises(ConfigError, match=r"grid\.0\.axes"):
        read_experiment(path)
    path.write_text("title: t\nbase: {}\ngrid: [{axes: [{a b: {}}]}]\n")
    with pytest.raises(ConfigError, match="grid"):
        read_experiment(path)


@pytest.mark.parametrize("name", ["length", "far", "forgetting", "ablations", "fewer"])
def test_the_experiments_are_configurations_of_l3ms_train(name, tmp_path):
    for cell in expand(read_experiment(EXPERIMENTS / name / "experiment.yaml")):
        filled = fill(cell.config, {"model": "/m", "here": str(EXPERIMENTS / name), **VALUES}) | {"output": "out"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(filled))
        assert load_config(tmp_path / "config.yaml").seed == cell.seed
