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
from l3ms.model.random_numbers import undrawn
from l3ms.rollouts.engines import Engine, name_of
from l3ms.runs.constraints import build_constraints
from l3ms.runs.data import Encoded, Example, encode, load_examples, load_prompts, overlap
from l3ms.runs.engines import build_engine
from l3ms.runs.fingerprints import BASE, of_base, of_constraints, of_rows
from l3ms.runs.loading import check_code
from l3ms.runs.models import context_room, load_model, options_of
from l3ms.runs.resuming import inputs_of
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
    base: str | None = None  # digest of what its adapters are of, where it has some


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
    before = inputs_of(run)
    if config.train.lora is None:
        tokenizer, model = load_model(str(folder), **options_of(config), console=console)
    else:  # as in the training; what they begin with is drawn, and replaced
        with undrawn(torch.device("cpu")):
            tokenizer, model = load_model(
                config.model, **options_of(config), lora=config.train.lora, adapters=str(folder), console=console
            )
    base = of_base(model)
    if before.get(BASE, base) != base:
        raise ConfigError(
            "model", f"{config.model} is not what the adapters of {run} were trained on: its weights have changed"
        )
    # From the run's own configuration: a divergence is that from the model it started with
    constraints = build_constraints(config, console, tokenizer, model)
    if config.train.device == "auto" and torch.cuda.is_available():
        model = model.cuda()
    context, room = context_room(model, config.train.max_new_tokens)
    field = "data.evaluation" if options.prompts is None else "--prompts"
    as_trained: dict[str, Any] = {
        "max_length": min(config.data.max_length, context), "max_prompt": room, "chat_template": config.data.chat_template,
    }  # fmt: skip
    encoded = encode(held_out, tokenizer, name=field, **as_trained)
    if not encoded.rows:
        raise ConfigError(field, encoded.nothing(room))
    notes += encoded.notes("held-out prompts") + overlap(train, held_out)
    if before:
        rows = {"data.evaluation": encoded.rows} if options.prompts is None else {}
        if train and not _is_split(config, options):
            rows["data.train"] = encode(train, tokenizer, **as_trained).rows
        found = {name: of_rows(part) for name, part in rows.items()} | of_constraints(config, constraints)
        notes += _changed(
            run, config, options, [name for name, value in found.items() if before.get(name, value) != value]
        )
    engine = build_engine(config.rollout, console)
    if engine is not None:
        notes.append(
            f"responses are sampled by {name_of(engine)}, in its precision; --engine transformers samples the model itself"
        )
    return Subject(config, folder, model, tokenizer, constraints, encoded, notes, engine, base)


def _is_split(config: RunConfig, options: CertifyOptions) -> bool:
    """Whether the held-out rows are those that a run kept from one data set."""
    return options.prompts is None and config.data.evaluation is None and config.data.evaluation_split is None


def _changed(run: Path, config: RunConfig, options: CertifyOptions, fields: list[str]) -> list[str]:
    """What is said of contents that are not those that the run was begun with."""
    if "data.evaluation" in fields and _is_split(config, options):
        raise ConfigError(
            "data.train", f"is not what {run} was trained on, so that what it held out is not known; --prompts FILE gives others"
        )  # fmt: skip
    unknown = ", so whether these prompts were trained on is not known"
    return [
        f"{name} is not what it was when the run was begun{unknown if name == 'data.train' else ''}" for name in fields
    ]


def _rows(config: RunConfig, options: CertifyOptions) -> tuple[list[str], list[Example], list[Example]]:
    """(what is to be said, training rows, held-out rows); of prompts from a file, the run's own data may be gone."""
    if options.prompts is None:
        return [], *load_examples(config.data, seed=config.seed)
    prompts = load_prompts(config.data, "--prompts", options.prompts)
    try:
        return [], load_examples(config.data, seed=config.seed)[0], prompts
    except ConfigError as error:
        return [f"whether these prompts were trained on is not known: {error}"], [], prompts
