"""A run of `l3ms train`, for the contestants that are one: the configuration of a task, run in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.versus.task import Tally, Task, Trained, quiet
from l3ms.config.run_config import load_config
from l3ms.runs.executing import train as execute
from l3ms.runs.report import read_metrics


def run(
    task: Task, train: Mapping[str, Any], folder: Path, *, weights: str = "average", scale: float | None = None
) -> Trained:
    """With the fields `train` of that section.

    Args:
        weights: "average", of the last fifth of the run, or "model", the last ones.
        scale: tokens per 1.0 of a violation; None: the default.
    """
    config = load_config(write(task, train, folder, scale))
    report = execute(config, console=quiet())
    run_folder = Path(config.output)
    tally = Tally()
    for row in read_metrics(run_folder / "metrics.jsonl"):
        if (mean := row.get("constraints/length/batch_mean")) is not None:
            tally.add([round(mean * task.responses)], loss=row.get("loss"), estimate=row["constraints/length/estimate"])
            tally.log[-1]["length"] = mean
    assert report["iterations"] == task.iterations
    return Trained(run_folder / weights, tally.tokens, tally.log)


def write(task: Task, train: Mapping[str, Any], folder: Path, scale: float | None = None) -> Path:
    """`config.yaml`, with which `l3ms train` does the same."""
    values = {
        "model": task.model,
        "output": str(folder / "run"),
        "seed": task.seed,
        "data": {"train": task.train, "evaluation": task.held_out, "max_length": task.max_length},
        "constraints": [{"type": "length", "min": float(task.min), "max": float(task.max), "scale": scale}],
        "train": {
            "iterations": task.iterations,
            "batch_size": task.batch_size,
            "constraint_batch_size": task.responses,
            "learning_rate": float(task.learning_rate),
            "max_new_tokens": task.max_new_tokens,
            "lora": {"r": task.lora_r, "alpha": task.lora_alpha},
            "device": "cpu",
            "save_steps": None,
            **train,
        },
        # What it leaves is sampled by the judge: here only as much as the report wants
        "evaluate": {"samples": 2, "batch_size": 2, "initial": False},
        "logging": {"tensorboard": False},
    }
    if values["train"]["solver"] == "none":
        values["constraints"] = []
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
