"""A run from its configuration: data, model, constraints, and where it goes on; all loaded and tried before a file is written."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from l3ms.barrier.schedules import ExponentialDecay, check_resolution
from l3ms.config.constraints import DataNLLConfig
from l3ms.config.data import DataConfig
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.data_nll import DataNLL
from l3ms.model.autocasting import has_bfloat16_products
from l3ms.ranks.group import first_of_machine_first, of_first, world
from l3ms.rollouts.engines import Engine
from l3ms.runs import resuming
from l3ms.runs.arguments import is_on_cpu, training_arguments
from l3ms.runs.constraints import build_constraints, try_rewards
from l3ms.runs.data import Encoded, Example, encode, load_examples, overlap
from l3ms.runs.engines import build_engine
from l3ms.runs.fingerprints import fingerprints, fingerprints_of_0_1
from l3ms.runs.folder import check_links, check_output
from l3ms.runs.joining import same_inputs
from l3ms.runs.models import context_room, load_model, options_of, refuse_adapters
from l3ms.runs.reading import files_of
from l3ms.runs.terminal import say
from l3ms.runs.trackers import check as check_trackers
from l3ms.training.arguments import L3MConfig


@dataclass(frozen=True)
class Run:
    """A run, loaded and tried: what `load_run` returns and `execute` takes."""

    config: RunConfig  # what it was made of
    tokenizer: Any
    model: Any  # with adapters, its head fused
    constraints: list[Constraint]
    train: Encoded  # rows of tokens
    held_out: Encoded
    arguments: L3MConfig
    inputs: dict[str, Any]  # fingerprints of what it starts from
    engine: Engine | None  # what samples; None: the model itself
    begun: list[Path]  # checkpoints from which it goes on, the first that can be; empty: it begins
    started: float  # time.monotonic() when its loading began

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def load_run(
    config: RunConfig, *, overwrite: bool = False, resume: bool = False, allow_code: bool = False, console: Console
) -> Run:
    """What `l3ms train` and `l3ms check` do first. Raises `ConfigError` for bad input; writes nothing.

    `resume`: a run of this configuration that was begun in the output folder goes on.
    """
    started = time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(config.output)

    def decide() -> tuple[RunConfig, bool]:
        """What is in the folder says; for all, since it changes as soon as one begins."""
        if not (resume and resuming.is_run(folder)):
            return config, False
        begun = resuming.as_begun(config)
        resuming.check_same(begun, folder)
        check_links(folder)
        return begun, True

    config, going_on = of_first(decide)
    of_first(lambda: check_trackers(config))
    of_first(lambda: check_output(folder, overwrite=overwrite, going_on=going_on, inputs=_local_inputs(config)))
    check_code(config, allow_code)
    with first_of_machine_first():
        train_examples, held_out_examples = load_examples(config.data, seed=config.seed)
        transformers.set_seed(config.seed)
        tokenizer, model = load_model(
            config.model, **options_of(config), lora=config.train.lora, console=console,
        )  # fmt: skip
    if config.train.lora is None:
        refuse_adapters(config.model, model)
    if slow := _slow_products(config):
        say(console, slow)
    constraints = build_constraints(config, console, tokenizer, model)
    engine = build_engine(config.rollout, console)
    if config.train.solver == "barrier":
        try:
            check_resolution(ExponentialDecay(end=config.train.mu_end), constraints)
        except ValueError as error:
            raise ConfigError("train.mu_end", str(error)) from None
    train, held_out = encode_sides(config, tokenizer, model, train_examples, held_out_examples, console)
    try_rewards(config, constraints, tokenizer, train.rows[:4], held_out.rows[:4])
    sides = {"data.train": train.rows, "data.evaluation": held_out.rows}
    inputs = fingerprints(config, model, tokenizer, sides, constraints)
    same_inputs(inputs, rows=len(train.rows), iterations=config.train.iterations)
    arguments = training_arguments(config)
    if arguments.world_size != world():
        raise ConfigError(
            "train.device", f"transformers knows of {arguments.world_size} process here and {world()} were started; set train.device: cpu"
        )  # fmt: skip

    def find() -> list[Path]:
        data = [item.batch_size for item in constraints if isinstance(item, DataNLL)]
        found = resuming.find(folder, console, model, max([config.train.constraint_batch_size, *data]))
        if found:
            of_0_1 = functools.partial(fingerprints_of_0_1, model, _trained_on(train, constraints))
            resuming.check_inputs(folder, inputs, of_0_1)
        return found

    begun = of_first(find) if going_on else []
    return Run(config, tokenizer, model, constraints, train, held_out, arguments, inputs, engine, begun, started)


def _slow_products(config: RunConfig) -> str | None:
    """What a user of bfloat16 wants to know of a CPU that has to do without: it is right there, and slow."""
    train = config.train
    if not (train.autocast or train.dtype == "bfloat16") or not is_on_cpu(config) or has_bfloat16_products():
        return None
    given = "train.dtype: bfloat16" if train.dtype == "bfloat16" else "train.autocast: true"
    return f"{given} is slow on this CPU, which has no products of bfloat16: without it a run is several times as fast"


def check_code(config: RunConfig, allow_code: bool) -> None:
    """Refuse a configuration that runs somebody's code, unless that was allowed."""
    if not allow_code:
        for field, what in config.runs_code.items():
            raise ConfigError(field, f"would import and run {what}; add --allow-code if you trust it")


def encode_sides(
    config: RunConfig, tokenizer: Any, model: Any, train: list[Example], held_out: list[Example], console: Console
) -> tuple[Encoded, Encoded]:
    """Token rows of both sides; what was cut or dropped is said. Prompts leave room for `max_new_tokens` responses."""
    context, room = context_room(model, config.train.max_new_tokens)
    for note in overlap(train, held_out):
        say(console, f"data.evaluation: {note}")
    sides = []
    for name, examples in (("data.train", train), ("held-out data", held_out)):
        field = name if name == "data.train" else "data.evaluation"
        encoded = encode(
            examples, tokenizer, max_length=min(config.data.max_length, context), max_prompt=room,
            chat_template=config.data.chat_template, name=field,
        )  # fmt: skip
        for note in encoded.notes(name):
            say(console, note)
        if not encoded.rows:
            limit = min(config.data.max_length - 1, room)
            raise ConfigError(field, encoded.nothing(limit))
        sides.append(encoded)
    wanted = config.train.batch_size * config.train.gradient_accumulation * world()
    if len(sides[0].rows) < wanted:
        factors = "batch_size x gradient_accumulation" + (" x processes" if world() > 1 else "")
        raise ConfigError(
            "train.batch_size",
            f"{factors} is {wanted}, but only {len(sides[0].rows)} rows are left to train on",
        )
    console.print(f"{len(sides[0].rows)} rows to train on, {len(sides[1].rows)} held out", highlight=False)
    return sides[0], sides[1]


def _local_inputs(config: RunConfig) -> dict[str, str]:
    """Field -> a path that is read; of a field with several files they are numbered."""
    paths = {"model": config.model, **_files("data", config.data)}
    for index, item in enumerate(config.constraints):
        for name in ("model", "reference"):
            if getattr(item, name, None) is not None:
                paths[f"constraints.{index}.{name}"] = getattr(item, name)
        if isinstance(item, DataNLLConfig):
            paths |= _files(f"constraints.{index}.data", item.data)
    for field, code in config.runs_code.items():
        if (source := code.rpartition(":")[0]).endswith(".py"):
            paths[field] = source
    return {field: path for field, path in paths.items() if Path(path).is_absolute()}


def _files(section: str, data: DataConfig) -> dict[str, str]:
    found = {}
    for name, source in (("train", data.train), ("evaluation", data.evaluation)):
        field = f"{section}.{name}"
        files = files_of(field, source) if source is not None else []
        found |= {
            field if len(files) == 1 else f"{field}.{i}": os.path.realpath(path) if os.path.isabs(path) else path
            for i, path in enumerate(files)
        }
    return found


def _trained_on(train: Encoded, constraints: list[Constraint]) -> dict[str, list[dict[str, Any]]]:
    """By field, all that is trained on."""
    rows = {"data.train": train.rows}
    for index, item in enumerate(constraints):
        if isinstance(item, DataNLL):
            rows[f"constraints.{index}.data.train"] = list(item.loader)
    return rows
