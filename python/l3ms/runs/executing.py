"""Execute a run: check everything, train, sample fresh responses on held-out prompts, and leave the run folder.

Nothing is written before the configuration, the data, the model and the reward functions have been loaded and tried.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console

from l3ms.barrier.schedules import ExponentialDecay, check_resolution
from l3ms.config.constraints import ConstraintConfig, DataNLLConfig
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.data_nll import DataNLL
from l3ms.measuring.evaluation import evaluate, half_width, prompt_key
from l3ms.runs import resuming
from l3ms.runs.data import Encoded, load_examples
from l3ms.runs.folder import MetricsWriter, check_output, prepare_output, save_weights, write_config
from l3ms.runs.labels import is_mean_length, solver_label
from l3ms.runs.loading import build_constraints, encode_sides, load_model, training_arguments, try_rewards
from l3ms.runs.progress import ProgressCallback, progress_bar
from l3ms.runs.report import examples_table, plot_run, summary_table, write_report
from l3ms.training import checkpoints
from l3ms.training.trainer import L3MTrainer
from l3ms.watching.watch import Watch


class Loaded(NamedTuple):
    """All that a run starts from, loaded and tried."""

    tokenizer: Any
    model: Any
    constraints: list[Constraint]
    train: Encoded
    held_out: Encoded


def load_run(config: RunConfig, *, overwrite: bool, allow_code: bool, console: Console) -> Loaded:
    """What `l3ms train` and `l3ms check` do first. Raises `ConfigError` for bad input; writes nothing."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_output(Path(config.output), overwrite=overwrite, inputs=_local_inputs(config))
    check_code(config, allow_code)
    train_examples, held_out_examples = load_examples(config.data, seed=config.seed)
    transformers.set_seed(config.seed)
    tokenizer, model = load_model(config, console)
    constraints = build_constraints(config, console, tokenizer, model)
    if config.train.solver == "barrier":
        try:
            check_resolution(ExponentialDecay(end=config.train.mu_end), constraints)
        except ValueError as error:
            raise ConfigError("train.mu_end", str(error)) from None
    train, held_out = encode_sides(config, tokenizer, model, train_examples, held_out_examples, console)
    try_rewards(config, constraints, tokenizer, train.rows[:4])
    return Loaded(tokenizer, model, constraints, train, held_out)


def execute(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run `config` and return its report. Raises `ConfigError` for bad input, before the output folder is touched.

    With `resume`, a run of the same configuration in the folder goes on from its newest valid checkpoint, and is, on a CPU, bit for bit
    the one that was not interrupted; one that is finished stays as it is; without one the run begins.
    """
    start = time.monotonic()
    console = console or Console()
    folder = Path(config.output)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each would write to the one folder
        raise ConfigError(
            "WORLD_SIZE", "l3ms train is one process; for several use l3ms.L3MTrainer in a script under torchrun or accelerate"
        )  # fmt: skip
    going_on = resume and resuming.is_run(folder)
    if going_on:
        resuming.check_same(config, folder)
        if (folder / "report.json").is_file():
            return _finished(folder, console)
    tokenizer, model, constraints, train, evaluation = load_run(
        config, overwrite=overwrite or going_on, allow_code=allow_code, console=console
    )
    arguments = training_arguments(config)
    transformers.set_seed(config.seed)  # whatever the constraints have drawn while they were loaded
    inputs = resuming.fingerprints(model, _rows(config, train, constraints))
    begun = resuming.find(folder, console) if going_on else None
    if begun is not None:
        resuming.check_inputs(folder, inputs)

    prepare_output(folder, keep=() if begun is None else ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints"))
    write_config(folder, config.model_dump())
    resuming.write_inputs(folder, inputs)
    bounds = [_bounds(item) for item in config.constraints]
    metrics = MetricsWriter(folder / "metrics.jsonl", log=() if begun is None else begun.log)
    progress = ProgressCallback(bounds, title=_title(config), console=console)
    watch = [] if config.watch is None else [Watch(config.watch, held_out=evaluation.rows)]
    trainer = L3MTrainer(
        model=model,
        args=arguments,
        train_dataset=train.rows,
        constraints=constraints,
        processing_class=tokenizer,
        callbacks=[metrics, progress, *watch, *_tensorboard(config, folder, begun)],
    )
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    sample = _evaluator(config, tokenizer, evaluation, constraints, console)

    samples: dict[str, Samples] = {}
    try:
        if config.evaluate.initial:
            samples["initial"] = sample(trainer.model, "before training")
        trainer.train(resume_from_checkpoint=None if begun is None else str(begun.checkpoint))
        save_weights(folder, "model", trainer.model, tokenizer)
        averaged = trainer.averaged_model()
        save_weights(folder, "average", averaged, tokenizer)
        samples["last"] = sample(trainer.model, "last iterate")
        samples["average"] = sample(averaged, "averaged weights")
    except KeyboardInterrupt:
        metrics.flush()
        raise KeyboardInterrupt(_kept(folder, metrics)) from None
    finally:
        progress.close()
    report = _report(config, trainer, bounds, start - metrics.seconds_before) | {
        key: found.summary for key, found in samples.items()
    }
    for item in watch:
        report |= {"tripped": item.tripped, "conflicts": item.conflicts}
    report["examples"] = _examples(samples)
    picture = write_report(folder, report, {key: found.lengths for key, found in samples.items()})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    console.print(summary_table(report), examples_table(report["examples"]))
    console.print(f"Report and picture: {picture.with_suffix('.json')}, {picture}", highlight=False, soft_wrap=True)
    return report


def _finished(folder: Path, console: Console) -> dict[str, Any]:
    console.print(f"The run in {folder} is finished.", markup=False, highlight=False, soft_wrap=True)
    if not (folder / "report.png").exists():  # ended while it was being drawn
        plot_run(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _kept(folder: Path, metrics: MetricsWriter) -> str:
    """What an interrupted run leaves."""
    found = next(iter(checkpoints.checkpoints(folder / "checkpoints")), None)  # --resume verifies it
    weights = [str(folder / name) for name in ("model", "average") if (folder / name).is_dir()]
    parts = [f"{metrics.iterations} iterations in {metrics.path}", " and ".join(weights) or "no weights yet"]
    return f"kept: {', '.join(parts)}; " + ("no checkpoint" if found is None else f"--resume goes on from {found}")


def _rows(config: RunConfig, train: Encoded, constraints: list[Constraint]) -> dict[str, list[dict[str, Any]]]:
    """By field, all that is trained on."""
    rows = {"data.train": train.rows}
    for index, item in enumerate(constraints):
        if isinstance(item, DataNLL):
            rows[f"constraints.{index}.data.train"] = list(item.loader)
    return rows


def _title(config: RunConfig) -> str:
    return solver_label({"solver": config.train.solver})


def _bounds(item: ConstraintConfig) -> dict[str, Any]:
    """What the report says of a constraint."""
    threshold = getattr(item, "threshold", None)
    return {"name": item.name, "type": item.type, "min": item.min, "max": item.max, "threshold": threshold}


def _local_inputs(config: RunConfig) -> dict[str, str]:
    paths = {"model": config.model, "data.train": config.data.train, "data.evaluation": config.data.evaluation}
    for index, item in enumerate(config.constraints):
        for name in ("model", "reference"):
            paths[f"constraints.{index}.{name}"] = getattr(item, name, None)
        if isinstance(item, DataNLLConfig):
            paths[f"constraints.{index}.data.train"] = item.data.train
            paths[f"constraints.{index}.data.evaluation"] = item.data.evaluation
    return {field: path for field, path in paths.items() if path is not None and Path(path).is_absolute()}


def check_code(config: RunConfig, allow_code: bool) -> None:
    """Refuse a configuration that runs somebody's code, unless that was allowed."""
    if not allow_code:
        for field, what in config.runs_code.items():
            raise ConfigError(field, f"would import and run {what}; add --allow-code if you trust it")


def _tensorboard(config: RunConfig, folder: Path, begun: resuming.Begun | None) -> list[Any]:
    if not config.logging.tensorboard:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    purge = None if begun is None else begun.iteration + 1  # what was logged after the checkpoint
    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge))]


class Samples(NamedTuple):
    """Fresh responses of one model to the held-out prompts, and what they come to."""

    summary: dict[str, Any]
    lengths: list[int]
    prompts: list[Any]
    completions: list[Any]


def _evaluator(
    config: RunConfig, tokenizer: Any, held_out: Encoded, constraints: list[Constraint], console: Console
) -> Callable[[Any, str], Samples]:
    """`sample(model, name)`: the same held-out rows for each model, as many as were asked for."""
    order = torch.randperm(len(held_out.rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    rows = [held_out.rows[i] for i in itertools.islice(itertools.cycle(order), config.evaluate.samples)]
    prompts, keys = [row["prompt"] for row in rows], [prompt_key(row) for row in rows]

    def sample(model: Any, name: str) -> Samples:
        with progress_bar(console, f"sampling, {name}") as advance:
            found = evaluate(
                model, tokenizer, rows, max_new_tokens=config.train.max_new_tokens, seed=config.seed,
                temperature=config.train.temperature, batch_size=config.evaluate.batch_size, constraints=constraints,
                progress=advance,
            )  # fmt: skip
        rewards = {}
        for item in constraints:
            if item.name in found.rewards:
                values = found.rewards[item.name]
                # Values of further data have rows of their own
                own = range(len(values)) if isinstance(item, DataNLL) else keys
                rewards[item.name] = _mean(values, own)
        return Samples({**found.summary, "constraints": rewards}, found.lengths, prompts, found.completions)

    return sample


def _examples(samples: dict[str, Samples], count: int = 3) -> list[dict[str, str]]:
    """The first prompts with the responses of the models, for the table: of a conversation the last turn."""

    def text(turns: Any) -> str:
        return turns if isinstance(turns, str) else turns[-1]["content"]

    prompts = samples["average"].prompts[:count]
    shown = {key: found for key, found in samples.items() if key != "last"}
    return [
        {"prompt": text(prompt), **{key: text(found.completions[row]) for key, found in shown.items()}}
        for row, prompt in enumerate(prompts)
    ]


def _mean(values: Sequence[float | None], keys: Sequence[Hashable]) -> dict[str, Any]:
    """Mean of the rewards of fresh samples, with its 95% interval; `keys` are equal where the prompts are."""
    pairs = [
        (value, key) for value, key in zip(values, keys, strict=True) if value is not None and math.isfinite(value)
    ]
    given = [value for value, _ in pairs]
    half = half_width(given, [key for _, key in pairs])
    if not math.isfinite(half):
        return {"mean": None, "ci95": None, "samples": len(given)}
    mean = statistics.fmean(given)
    return {"mean": mean, "ci95": [mean - half, mean + half], "samples": len(given)}


def _report(config: RunConfig, trainer: L3MTrainer, bounds: list[dict[str, Any]], start: float) -> dict[str, Any]:
    """What the run was and how it went, without the models' summaries."""
    logs = [row for row in trainer.state.log_history if "l3m/skipped_steps" in row]
    length = next((item for item in bounds if is_mean_length(item)), {})
    iterations = trainer.state.global_step
    return {
        "seed": config.seed,
        "seconds": round(time.monotonic() - start, 1),
        "iterations": iterations,
        "solver": config.train.solver,
        "bounds": {"min": length.get("min"), "max": length.get("max")},
        "constraints": bounds,
        "skipped_steps": int(logs[-1]["l3m/skipped_steps"]) if logs else 0,
        "mu_end": logs[-1].get("l3m/mu") if logs else None,
        "average_from": trainer.average_from,
    }
