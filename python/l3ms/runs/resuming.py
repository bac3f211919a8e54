"""`l3ms train --resume`: whether the run in a folder is the one that is asked for, and where it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from l3ms.config.run_config import RunConfig, load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.terminal import say
from l3ms.runs.whole_files import write_json
from l3ms.training import checkpoints

INPUTS = "inputs.json"
LATER = {"output", "evaluate", "logging", "train.save_steps"}  # what may change: it does not change what is learnt


class Begun(NamedTuple):
    """A run that goes on."""

    checkpoint: Path
    log: list[dict[str, Any]]  # transformers' log up to it

    @property
    def iteration(self) -> int:
        return int(self.checkpoint.name.removeprefix("checkpoint-"))


def is_run(folder: Path) -> bool:
    """Whether a run has been begun in the folder."""
    return (folder / "config.yaml").is_file()


def is_finished(config: RunConfig) -> bool:
    """Whether the run of `config` is in its folder, whole. Raises as `check_same` where another one is there."""
    folder = Path(config.output)
    if not is_run(folder):
        return False
    check_same(config, folder)
    return (folder / "report.json").is_file()


def check_same(config: RunConfig, folder: Path) -> None:
    """Raise `ConfigError` naming the first field in which the run in `folder` differs from `config`, but for `LATER`."""
    try:
        before = dict(_fields(load_config(folder / "config.yaml").model_dump(mode="json")))
    except ConfigError as error:
        raise ConfigError(
            "resume", f"{folder / 'config.yaml'} cannot be read ({error}); --overwrite begins anew"
        ) from None
    now = dict(_fields(config.model_dump(mode="json")))
    for field in sorted(before.keys() | now.keys()):
        if before.get(field) != now.get(field):
            raise ConfigError(
                field, f"is {now.get(field)!r}, but was {before.get(field)!r} when the run in {folder} was begun; --resume goes "
                "on with what it was, --overwrite begins anew"
            )  # fmt: skip


def _fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        field = f"{prefix}{key}"
        if field in LATER:
            continue
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{field}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from _fields({str(index): item for index, item in enumerate(value)}, f"{field}.")
        else:
            yield field, value


def find(folder: Path, console: Console) -> Begun | None:
    """The newest valid checkpoint of the run in `folder`; None, having said so, where there is none. Damaged ones are named."""
    found, damaged = checkpoints.newest(folder / "checkpoints")
    for path, wrong in damaged.items():
        say(console, f"{path} is not used: {wrong}")
    if found is None:
        say(console, f"{folder} has no checkpoint to resume from: beginning anew")
        return None
    state = json.loads((found / "trainer_state.json").read_text(encoding="utf-8"))
    begun = Begun(found, state["log_history"])
    say(console, f"Resuming at iteration {begun.iteration}, from {found}")
    return begun


# ---- what a run was begun with ----


def fingerprints(model: Any, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    """By field, of the weights that a run starts from and of its token rows: other data under the same name are found out."""
    return {"model": _of_model(model), **{field: _of_rows(part) for field, part in rows.items()}}


def check_inputs(folder: Path, found: Mapping[str, str]) -> None:
    """Raise `ConfigError` where the run in `folder` was begun with others."""
    path = folder / "checkpoints" / INPUTS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError("resume", f"{path} cannot be read; --overwrite begins anew") from None
    for field, value in found.items():
        if before.get(field) != value:
            raise ConfigError(
                field, "is not what the run was begun with: its contents have changed; --overwrite begins anew"
            )


def write_inputs(folder: Path, found: Mapping[str, str]) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_json(folder / "checkpoints" / INPUTS, found)


def _of_rows(rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            digest.update(torch.tensor([len(row[name]), *row[name]], dtype=torch.int32).numpy().tobytes())
    return digest.hexdigest()


def _of_model(model: Any) -> str:
    """Of names, shapes and the beginning of each parameter: a digest of all weights would take longer than loading them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().reshape(-1)[:256].double().cpu().numpy().tobytes())
    return digest.hexdigest()
