"""`l3ms train --resume`: whether the run in a folder is the one that is asked for, and where it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from l3ms.config.run_config import RunConfig, load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.ranks.group import world
from l3ms.regular_files import read_regular
from l3ms.runs.fingerprints import FORMAT
from l3ms.runs.terminal import say
from l3ms.runs.whole_files import write_json
from l3ms.training import checkpoints
from l3ms.training.checkpoint_contents import misfit, unreadable

INPUTS = "inputs.json"
# What may change: it does not change what is learnt.
LATER = {
    *("output", "evaluate", "logging", "train.save_steps", "train.timeout", "train.agree_every"),
    *("rollout.server", "rollout.folder"),
}


def iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_run(folder: Path) -> bool:
    """Whether a run has been begun in the folder."""
    return (folder / "config.yaml").is_file()


def as_begun(config: RunConfig) -> RunConfig:
    """With what the run in the folder was begun with where `config` leaves it open and the default has changed since 0.1.0."""
    folder = Path(config.output)
    if not is_run(folder) or "smoothing" in config.train.model_fields_set:
        return config
    try:
        begun = load_config(folder / "config.yaml").train.smoothing
    except ConfigError:
        return config  # `check_same` says so
    return config.model_copy(update={"train": config.train.model_copy(update={"smoothing": begun})})


def is_finished(config: RunConfig) -> bool:
    """Whether the run of `config` is in its folder, whole. Raises as `check_same` where another one is there."""
    folder = Path(config.output)
    if not is_run(folder):
        return False
    check_same(as_begun(config), folder)
    return (folder / "report.json").is_file()


def check_same(config: RunConfig, folder: Path) -> None:
    """Raise `ConfigError` naming the first field in which the run in `folder` differs from `config`, but for `LATER`."""
    try:
        before = dict(fields(load_config(folder / "config.yaml").model_dump(mode="json")))
    except ConfigError as error:
        raise ConfigError(
            "resume", f"{folder / 'config.yaml'} cannot be read ({error}); --overwrite begins anew"
        ) from None
    now = dict(fields(config.model_dump(mode="json")))
    for field in sorted(before.keys() | now.keys()):
        if before.get(field) != now.get(field):
            raise ConfigError(
                field, f"is {now.get(field)!r}, but was {before.get(field)!r} when the run in {folder} was begun; --resume goes "
                "on with what it was, --overwrite begins anew"
            )  # fmt: skip


def fields(
    values: Mapping[str, Any], prefix: str = "", leave_out: Collection[str] = LATER
) -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of a configuration."""
    for key, value in values.items():
        field = f"{prefix}{key}"
        if field in leave_out:
            continue
        if isinstance(value, dict) and value:
            yield from fields(value, f"{field}.", leave_out)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from fields({str(index): item for index, item in enumerate(value)}, f"{field}.", leave_out)
        else:
            yield field, value


def find(folder: Path, console: Console, model: Any, taken: int) -> list[Path]:
    """The valid checkpoints of the run in `folder`, the newest first; empty, having said so, where there is none. Damaged ones are named.

    They are checked against the run's `model`; `taken`: rows that an iteration takes for its constraints, at most.
    """
    found = []
    for path in checkpoints.checkpoints(folder / "checkpoints"):
        wrong = checkpoints.problem(path) or unreadable(path, taken) or misfit(path, model)
        if wrong is None:
            found.append(path)
        else:
            say(console, f"{path} is not used: {wrong}")
    if found and (ranks := _ranks_of(found[0])) != world():
        raise ConfigError(
            "resume", f"the run in {folder} is one of {ranks} process{'es' * (ranks > 1)} and this is one of {world()}, which would be "
            "another run: start as many, or --overwrite begins anew"
        )  # fmt: skip
    if not found:
        say(console, f"{folder} has no checkpoint to resume from: beginning anew")
    else:
        say(console, f"Resuming at iteration {iteration(found[0])}, from {found[0]}")
    return found


def _ranks_of(checkpoint: Path) -> int:
    """The processes that wrote it: each has random numbers of its own."""
    return max(1, len(list(checkpoint.glob("random*.json"))))


class SavedAsNow(TrainerCallback):
    """Checkpoints as often as the configuration says now: transformers takes from a checkpoint how often they were saved before it."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


# ---- what a run was begun with ----


def check_inputs(folder: Path, found: Mapping[str, Any], of_0_1: Callable[[], Mapping[str, str]]) -> None:
    """Raise `ConfigError` where the run in `folder` was begun with others. `of_0_1`: what 0.1.0 would have found, for a run of its."""
    path = folder / "checkpoints" / INPUTS
    try:
        before = json.loads(read_regular(path).decode("utf-8"))
        known = found if "format" in before else of_0_1()
        changed = [field for field, value in known.items() if before.get(field) != value]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigError("resume", f"{path} cannot be read; --overwrite begins anew") from None
    for field in changed:
        raise ConfigError(
            "resume" if field == "format" else field,
            "is not what the run was begun with: its contents have changed; --overwrite begins anew",
        )


def write_inputs(folder: Path, found: Mapping[str, Any]) -> None:
    """For --resume, and for certificates when there are no checkpoints any more."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    for place in (folder / "checkpoints", folder):
        write_json(place / INPUTS, found)


def inputs_of(folder: Path) -> dict[str, Any]:
    """What the run in a folder was begun with, beyond its checkpoints; nothing of runs from before that was kept."""
    path = folder / INPUTS
    if not os.path.lexists(path):
        return {}
    try:
        found = json.loads(read_regular(path).decode("utf-8"))
        known = found["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(str(path), "cannot be read, and says what the run was begun with") from None
    return found if known else {}
