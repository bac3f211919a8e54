"""L3M: the barrier, as `l3ms train` runs it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.versus.task import Task, Trained, only
from experiments.versus.yaml_run import run


def train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained:
    """setting: `scale` of the constraint, and any of `smoothing`, `warmup`, `mu_end`; by default none, which is what the library has."""
    own = only(setting, "scale", "smoothing", "warmup", "mu_end")
    scale = own.pop("scale", None)
    return run(task, {"solver": "barrier", **own}, folder, scale=scale)
