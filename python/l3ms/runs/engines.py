"""The engine of a configuration: what samples a run's responses."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from l3ms.config.rollout import RolloutConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.model.batches import prompt_part
from l3ms.model.pretrained import reason
from l3ms.rollouts.engines import Engine, as_engine
from l3ms.rollouts.sampling import rollout
from l3ms.rollouts.vllm_engine import VllmEngine
from l3ms.rollouts.vllm_server import VllmServerEngine
from l3ms.runs.terminal import say
from l3ms.runs.user_rewards import load_named


def build_engine(section: RolloutConfig, console: Console) -> Engine | None:
    """None where the model samples itself. The caller has checked that running code is allowed. Raises `ConfigError` naming the field."""
    if section.engine == "transformers":
        return None
    if section.code is not None:
        found, source = load_named("rollout.engine", section.code)
        say(console, f"Running code for the responses: {source}")
        try:
            return as_engine(found() if isinstance(found, type) else found)
        except (Exception, SystemExit) as error:
            raise ConfigError("rollout.engine", reason(error)) from error
    try:
        if section.server is not None:
            return VllmServerEngine(section.server, folder=section.folder)
        return VllmEngine(**section.options)
    except ValueError as error:
        raise ConfigError("rollout.options" if section.options else "rollout.engine", str(error)) from error


@torch.no_grad()
def try_engine(engine: Engine | None, model: Any, tokenizer: Any, row: dict[str, Any], temperature: float) -> None:
    """Two tokens, before anything is written: what does not start, or cannot take the weights, costs no run."""
    if engine is None:
        return
    ids = [prompt_part(row)]
    try:
        with torch.random.fork_rng():
            rollout(
                model,
                tokenizer,
                [row["prompt"]],
                prompt_ids=ids,
                max_new_tokens=2,
                temperature=temperature,
                engine=engine,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of somebody's code
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError("rollout.engine", f"{kind}{reason(error)}") from error
