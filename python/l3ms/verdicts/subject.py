"""What is certified: a model of a run folder, the constraints it was trained with, and rows it has not been trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from l3ms.config.rollout import RolloutConfig
from l3ms.config.run_config import RunConfig, load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint
from l3ms.rollouts.engines import Engine, name_of
from l3ms.runs.constraints import build_constraints
from l3ms.runs.data import Encoded, Example, encode, load_examples, load_prompts, overlap
from l3ms.runs.engines import build_engine
from l3ms.runs.loading import check_code
from l3ms.runs.models import context_room, load_model, options_of
from l3ms.verdicts.options import FOLDERS, CertifyOptions


@dataclass(frozen=True)
class Subject:
    """What is certified: a model of a run, its constraints, and rows it has not been trained on."""

    config: RunConfig
    folder: Path  # of the weights
    model: Any
    tokenizer: Any
    constraints: list[Constraint]
    held_out: Encoded
    notes: list[str]
    engine: Engine | None = None  # what samples; None: the model itself


def run_config(run: Path) -> RunConfig:
    if not (run / "config.yaml").is_file():
        raise ConfigError(str(run), "is not a run folder: it has no config.yaml")
    return load_config(run / "config.yaml")


def load_subject(run: Path, options: CertifyOptions, console: Console) -> Subject:
    """Configuration, weights, constraints and held-out rows of a run folder."""
    config = run_config(run)
    folder = run.resolve() / FOLDERS[options.weights]
    if not folder.is_dir():
        raise ConfigError("--weights", f"{run} has no {folder.name}/: the run has not come so far")
    if all(item.monitor for item in config.constraints):
        what = "monitors alone" if config.constraints else "none"
        raise ConfigError("constraints", f"{run} has {what}, so there is nothing to certify")
    if options.engine is not None:
        config = config.model_copy(update={"rollout": RolloutConfig(engine=options.engine)})
    names = {item.name for item in config.constraints}
    for name in options.ranges or {}:
        if name not in names:
            raise ConfigError("--range", f"no constraint is called {name!r}; there are {', '.join(sorted(names))}")
    # A run folder brings its own code, whatever model it says that it started from
    check_code(config.model_copy(update={"model": f"{folder} and of {config.model}"}), options.allow_code)
    notes, train, held_out = _rows(config, options)
    tokenizer, model = load_model(str(folder), **options_of(config), console=console)  # adapters are in the folder
    # From the run's own configuration: a divergence is that from the model it started with
    constraints = build_constraints(config, console, tokenizer, model)
    if config.train.device == "auto" and torch.cuda.is_available():
        model = model.cuda()
    context, room = context_room(model, config.train.max_new_tokens)
    field = "data.evaluation" if options.prompts is None else "--prompts"
    encoded = encode(
        held_out, tokenizer, max_length=min(config.data.max_length, context), max_prompt=room,
        chat_template=config.data.chat_template, name=field,
    )  # fmt: skip
    if not encoded.rows:
        raise ConfigError(field, encoded.nothing(room))
    notes += encoded.notes("held-out prompts") + overlap(train, held_out)
    engine = build_engine(config.rollout, console)
    if engine is not None:
        notes.append(
            f"responses are sampled by {name_of(engine)}, in its precision; --engine transformers samples the model itself"
        )
    return Subject(config, folder, model, tokenizer, constraints, encoded, notes, engine)


def _rows(config: RunConfig, options: CertifyOptions) -> tuple[list[str], list[Example], list[Example]]:
    """(what is to be said, training rows, held-out rows); of prompts from a file, the run's own data may be gone."""
    if options.prompts is None:
        return [], *load_examples(config.data, seed=config.seed)
    prompts = load_prompts(config.data, "--prompts", options.prompts)
    try:
        return [], load_examples(config.data, seed=config.seed)[0], prompts
    except ConfigError as error:
        return [f"whether these prompts were trained on is not known: {error}"], [], prompts
