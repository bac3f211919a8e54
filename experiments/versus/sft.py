"""Plain supervised fine-tuning: the task loss that the others are measured by, and no constraint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.versus.task import Task, Trained, only
from experiments.versus.yaml_run import run


def train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained:
    only(setting)
    return run(task, {"solver": "none"}, folder, weights="model")
