"""A run on several processes: they meet, and begin only where they have the same to begin with."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import l3m_kernels
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.ranks import group, lookout
from l3ms.ranks.agreement import Disagreement, differences
from l3ms.runs.arguments import is_on_cpu
from l3ms.runs.resuming import fields

SEEN = 20.0  # seconds in which a file of rank 0 appears on other machines


def join(config: RunConfig, console: Console, **options: Any) -> Console:
    """Make this process one of those that were started together for the run of `config`. -> a console that speaks on rank 0 alone.

    Args:
        options: of the command, which all must have alike.

    Raises:
        ConfigError: the configuration of a rank is another, naming the field and the rank; or the launcher sets what the file does not.
        Disagreement: the packages of a rank are others.
    """
    group.join(config.train.timeout, on_cpu=is_on_cpu(config))
    _check_launcher(config)
    if group.world() == 1:
        return console
    lookout.doing(lambda: "loading")
    for found in differences(versions()):
        raise Disagreement(
            f"rank {found.rank} runs {found.field} {found.value}, and the others {found.usual}: install the same on all"
        )
    known = dict(fields(config.model_dump(mode="json"), leave_out=()))
    for found in differences({**known, **options}):
        raise ConfigError(
            found.field,
            f"is {json.dumps(found.value)} on rank {found.rank}, and {json.dumps(found.usual)} on the others",
        )
    return console if group.is_first() else Console(quiet=True, force_terminal=False)


def versions() -> dict[str, str]:
    return {
        "l3m_kernels": l3m_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }


def same_inputs(found: Mapping[str, Any], **counts: int) -> None:
    """Raise `ConfigError` on all ranks where one of them has read other contents than the others. `counts`: by what is counted."""
    for wrong in differences(found):
        raise ConfigError(wrong.field, f"has other contents on rank {wrong.rank} than on the others")
    for wrong in differences(counts):
        raise ConfigError(
            "data.train", f"rank {wrong.rank} has {wrong.value} {wrong.field}, and the others {wrong.usual}"
        )


def same_folder(folder: Path) -> None:
    """Raise `ConfigError` where a rank does not see what rank 0 has written into the folder of the run."""
    if group.world() == 1:
        return
    token = group.of_first(lambda: _file_of(folder))
    begin = time.monotonic()
    while not (there := _file_of(folder) == token) and time.monotonic() - begin < SEEN:
        time.sleep(0.2)
    for rank, sees in enumerate(group.gather(there)):
        if not sees:
            raise ConfigError(
                "output",
                f"rank {rank} does not see what rank 0 writes to {folder}: give a folder that all machines share",
            )


def _file_of(folder: Path) -> tuple[int, int] | None:
    """Size and time of the configuration in it."""
    try:
        found = (folder / "config.yaml").stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _check_launcher(config: RunConfig) -> None:
    """What `accelerate launch` would change without the configuration saying so."""
    precision, wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "bf16" if config.train.autocast else "no"
    if precision not in ("no", wanted):
        raise ConfigError("train.autocast", f"accelerate launch asks for {precision}, and the run for {wanted}: leave out "
                          "--mixed-precision, or set train.autocast: true for bf16")  # fmt: skip
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigError(
            "ACCELERATE_DYNAMO_BACKEND",
            "a compiled model is not taken: leave out --dynamo-backend of accelerate launch",
        )
