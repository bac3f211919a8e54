"""`logging.report_to`: the trackers that transformers knows, and what each of them can be told."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

NAMES = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
WITH_TABLES = ("dagshub", "mlflow", "tensorboard", "trackio", "wandb")
# Who has no such thing. TensorBoard shows all three among the parameters of the run.
WITHOUT = {
    "run_name": ("azure_ml", "codecarbon", "dvclive", "flyte", "kubeflow"),
    "project": ("azure_ml", "dvclive", "flyte", "kubeflow"),
    "tags": ("azure_ml", "codecarbon", "dvclive", "flyte", "kubeflow", "trackio"),
}


def named(report_to: str | Sequence[str]) -> list[str]:
    """The trackers by name, each once; `["all"]` for all that are installed."""
    names = [report_to] if isinstance(report_to, str) else list(dict.fromkeys(report_to))
    return [] if names == ["none"] else names


def wrong_trackers(names: Sequence[str], *, tensorboard: bool, told: Collection[str], tables: bool) -> str | None:
    """What is wrong with `logging`, beginning with the field; None where nothing is.

    Args:
        names: as `named` gives them.
        tensorboard: event files are wanted.
        told: of run_name, project and tags those that are given.
        tables: something is said of the tables of completions.
    """
    for name in names:
        if name in ("all", "none"):
            if len(names) > 1:
                return f"report_to {name!r} stands alone, got {', '.join(names)}"
        elif name not in NAMES:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), (*NAMES, "all", "none"), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"wanted all, none or of {', '.join(NAMES)}"
            return f"report_to unknown tracker {name!r}; {hint}"
    if "tensorboard" in names and not tensorboard:
        return "report_to names tensorboard, and logging.tensorboard is false: leave one of them out"
    if {"mlflow", "dagshub"} <= set(names):
        return "report_to names mlflow and dagshub, which is mlflow on a server of its own: name one of them"
    for field in told:
        if not names:
            return f"{field} is for trackers, and logging.report_to names none"
        if without := [name for name in names if name in WITHOUT[field]]:
            what = {"run_name": "name of a run"}.get(field, field)
            return f"{field} cannot be told to {', '.join(without)} (no {what} there): leave it out, or them out of logging.report_to"
    if tables and not set(names) & set(WITH_TABLES):
        return f"completions needs a tracker with tables in logging.report_to ({', '.join(WITH_TABLES)}), got {', '.join(names) or 'none'}"
    return None
