"""`l3ms check CONFIG`: all that a run loads and tries, a few responses of the untrained model, a few timed iterations. Nothing is kept."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from l3ms.barrier.schedules import flat_across, noise_floor, scale_to_set
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.single_answers import SingleAnswers, bounds_to_add, is_mean_length, open_sides
from l3ms.constraints.trl_arguments import trl_arguments
from l3ms.measuring.evaluation import Evaluation, evaluate, groups_of, prompt_key, standard_error
from l3ms.ranks.group import is_first, world
from l3ms.runs.arguments import make_optimizer, named_optimizer, training_arguments
from l3ms.runs.joining import join
from l3ms.runs.labels import constraint_label, wanted_text
from l3ms.runs.loading import Run, load_run
from l3ms.runs.models import try_model
from l3ms.runs.progress import progress_bar
from l3ms.runs.terminal import say
from l3ms.runs.whole_files import write_json
from l3ms.training.trainer import L3MTrainer
from l3ms.verdicts import costs
from l3ms.verdicts.certificate_table import number
from l3ms.verdicts.costs import Cost, Sampled
from l3ms.verdicts.quantiles import normal_cdf

AT_REST = 20  # batches that an estimate is made of where nothing moves


@dataclass(frozen=True)
class Start:
    """Where a constraint stands before training."""

    name: str
    min: float | None  # bounds on what the values are: native units, or a share
    max: float | None
    values: int  # finite ones
    missing: int  # None
    nonfinite: int
    lowest: float  # of the values; NaN without any
    highest: float
    mean: float
    stderr: float  # responses to one prompt count once
    feasible: float  # probability that the mean is within the bounds, by the normal approximation of the estimate
    within: float  # share of single responses within the bounds
    monitor: bool = False  # without bounds: the last two are NaN
    data: bool = False  # a loss, which is differentiated itself: it needs no spread
    deviation: float = math.nan  # standard, of single values

    @staticmethod
    def of(constraint: Constraint, values: Sequence[float | None], groups: Sequence[Hashable] | None = None) -> Start:
        given = [float(value) for value in values if value is not None]
        finite = [value for value in given if math.isfinite(value)]
        keys = range(len(values)) if groups is None else groups
        kept = [key for value, key in zip(values, keys, strict=True) if value is not None and math.isfinite(value)]
        low = -math.inf if constraint.low is None else constraint.low
        high = math.inf if constraint.high is None else constraint.high
        mean = statistics.fmean(finite) if finite else math.nan
        deviation = statistics.stdev(finite) if len(finite) > 1 else math.nan
        stderr = standard_error(finite, kept) if deviation > 0 else deviation
        if constraint.monitor:
            feasible = math.nan
        elif stderr > 0:
            feasible = normal_cdf((high - mean) / stderr) - normal_cdf((low - mean) / stderr)
        else:
            feasible = float(low <= mean <= high) if finite else math.nan
        return Start(
            constraint.name, constraint.low, constraint.high, len(finite), len(values) - len(given),
            len(given) - len(finite), min(finite, default=math.nan), max(finite, default=math.nan), mean, stderr, feasible,
            sum(low <= value <= high for value in finite) / len(finite) if finite and not constraint.monitor else math.nan,
            constraint.monitor, constraint.data, deviation,
        )  # fmt: skip

    def warnings(self) -> list[str]:
        lines = []
        if not self.values:
            so = "" if self.monitor else "; as long as it is so, the constraint does nothing"
            lines.append(f"{self.name}: no response has a value{so}")
        elif self.values > 1 and self.lowest == self.highest and not (self.monitor or self.data):
            lines.append(f"{self.name}: all values are {self.lowest:g}; a constant reward has no gradient to follow")
        if self.missing and self.values:
            lines.append(f"{self.name}: {self.missing} of {self.missing + self.values} responses have no value (None)")
        if self.nonfinite:
            lines.append(
                f"{self.name}: {self.nonfinite} values are NaN or infinite; train.nonfinite: drop leaves them out"
            )
        return lines


def check(
    config: RunConfig,
    *,
    samples: int = 64,
    json: Path | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Load, sample, time; print what was found and return it. Raises `ConfigError` naming the field for what would stop a run."""
    console = join(config, console or Console(), overwrite=overwrite, samples=samples, allow_code=allow_code)
    run = load_run(config, overwrite=overwrite, allow_code=allow_code, console=console)
    loading = time.monotonic() - run.started
    tokenizer, constraints, train = run.tokenizer, run.constraints, run.train
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(run, folder)
        order = torch.randperm(len(train.rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        rows = [train.rows[order[n % len(order)]] for n in range(samples)]
        # The first responses of a model take longer: how it is sampled is found out
        try_model(trainer.model, tokenizer, rows[0], config.train.temperature)
        start, sampling = time.monotonic(), 0.0
        with progress_bar(console, f"sampling {samples} responses to training prompts") as show:

            def advance(done: int, total: int) -> None:
                nonlocal sampling
                sampling = time.monotonic() - start
                show(done, total)

            found = evaluate(
                trainer.model, tokenizer, rows, max_new_tokens=config.train.max_new_tokens, seed=config.seed,
                temperature=config.train.temperature, batch_size=config.evaluate.batch_size, constraints=constraints,
                training=trl_arguments(iterations=config.train.iterations), progress=advance, engine=run.engine, together=True,
            )  # fmt: skip
        share = -(-samples // world())  # that this process sampled
        response = (time.monotonic() - start) / share
        prompts = [prompt_key(row) for row in rows]
        starts = [Start.of(item, found.rewards[item.name], groups_of(item, prompts)) for item in constraints]
        _refuse_nonfinite(config, starts)
        size = min(config.evaluate.batch_size, share)
        cost = costs.measure(
            config, trainer, train.rows, loading=loading, response=response, folder=Path(folder),
            evaluated=Sampled(found.lengths[:: world()][:size], sampling * size / share),
        )  # fmt: skip
    result = {
        "constraints": [asdict(item) for item in starts],
        "samples": samples,
        "length": found.summary["length"],
        "ended": found.summary["ended"],
        "truncated": 1 - found.summary["ended"],
        "perplexity": found.summary["perplexity"],
        "warnings": [line for item in starts for line in item.warnings()],
        "advice": [
            *_single_answers(constraints, found, config.train.max_new_tokens),
            *_flat_barriers(constraints, starts, config),
        ],
        "cost": asdict(cost),
    }
    _print(result, starts, cost, config, console)
    if json is not None and is_first():
        write_json(json, result)
    return result


def _refuse_nonfinite(config: RunConfig, starts: Sequence[Start]) -> None:
    for index, item in enumerate(starts):
        if item.nonfinite and config.train.nonfinite == "raise":
            total = item.nonfinite + item.values + item.missing
            raise ConfigError(
                f"constraints.{index}",
                f"{item.nonfinite} of {total} values of {item.name!r} are NaN or infinite; "
                "train.nonfinite: drop leaves such responses out",
            )


def _single_answers(constraints: Sequence[Constraint], found: Evaluation, limit: int) -> list[str]:
    """A line for each bound on a mean length that has none on single answers beside it: what they are now, and the YAML to add."""
    lines = []
    for item in filter(is_mean_length, constraints):
        short, cut = open_sides(item, constraints)
        if short or cut:
            now = SingleAnswers.of(item, found.lengths, found.summary["ended"]).text(limit)
            lines.append(
                f"{item.name}: a bound on the mean leaves single answers free (now {now}); "
                f"to bound 95% of them, add {bounds_to_add(item, short=short, cut=cut)}"
            )
    return lines


def _flat_barriers(constraints: Sequence[Constraint], starts: Sequence[Start], config: RunConfig) -> list[str]:
    """A line for each range across which the barrier's pull hardly changes, at the mu that the noise of the estimates will leave."""
    if config.train.solver != "barrier" or config.train.mu != "auto":
        return []
    lines, count = [], config.train.constraint_batch_size * world()
    for item, start in zip(constraints, starts, strict=True):
        at_rest = start.deviation / math.sqrt(AT_REST * count)
        mu = min(1.0, float(noise_floor(torch.tensor(2 * at_rest / item.unit))))
        if start.deviation > 0 and flat_across(item, mu):
            lines.append(
                f"{item.name}: {count} responses leave mu at about {mu:.2f}, and a barrier {scale_to_set(item)}"
            )
    return lines


def _trainer(run: Run, folder: str) -> L3MTrainer:
    """As that of the run, for a few iterations, its folder elsewhere; all sample."""
    iterations = 1 + max(costs.LEAST, min(costs.ITERATIONS, run.config.train.iterations))
    short = run.config.train.model_copy(update={"iterations": iterations, "warmup": 0, "save_steps": None})
    each = run.config.rollout.model_copy(update={"every": 1, "reuse": 1})
    trainer = L3MTrainer(
        model=run.model,
        args=training_arguments(run.config.model_copy(update={"output": folder, "train": short, "rollout": each})),
        train_dataset=run.train.rows,
        constraints=run.constraints,
        engine=run.engine,
        processing_class=run.tokenizer,
        optimizer_cls_and_kwargs=named_optimizer(run.config),
    )
    make_optimizer(trainer)
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _print(result: dict[str, Any], starts: Sequence[Start], cost: Cost, config: RunConfig, console: Console) -> None:
    if starts:
        style: Any = {"title_style": "bold", "header_style": "bold", "title_justify": "left", "caption_justify": "left"}
        table = Table(title="Before training", box=box.SIMPLE_HEAD, pad_edge=False, **style)
        for heading, width in (
            ("constraint", 10),
            ("wanted", 6),
        ):  # folded where a terminal is narrow, and never left out
            table.add_column(heading, overflow="fold", min_width=width)
        counts = {"missing": [item.missing for item in starts], "not finite": [item.nonfinite for item in starts]}
        counts = {heading: column for heading, column in counts.items() if any(column)}  # a terminal has 80 characters
        for heading in ("mean", "std. error", "lowest", "highest", "feasible", "within", *counts):
            in_two_lines = heading == "std. error"
            table.add_column(heading, justify="right", no_wrap=not in_two_lines, min_width=7 if in_two_lines else None)
        texts = {item.name: (constraint_label(vars(item)), wanted_text(vars(item))) for item in config.constraints}
        for row, item in enumerate(starts):
            numbers = [number(value) for value in (item.mean, item.stderr, item.lowest, item.highest)]
            shares = ["-" if math.isnan(value) else f"{100 * value:.0f}%" for value in (item.feasible, item.within)]
            label, wanted = map(escape, texts[item.name])
            table.add_row(label, wanted, *numbers, *shares, *(str(column[row]) for column in counts.values()))
        table.caption = (
            f"{result['samples']} responses to training prompts. feasible: probability that the mean is within the bounds; "
            "within: share of single responses"
        )
        console.print(table)
    for line in result["warnings"]:
        say(console, f"Warning: {line}")
    for line in result["advice"]:
        say(console, line)
    length = result["length"]
    fewer = config.rollout.every != 1 or config.rollout.reuse > 1
    most = "at most" if fewer else "about"
    on, each = (f" on {world()} processes", " of each") if world() > 1 else ("", "")
    lines = [
        f"Responses: {length['mean']:.1f} tokens on average, {100 * result['ended']:.0f}% end by themselves, "
        f"{100 * result['truncated']:.0f}% are cut at {config.train.max_new_tokens} tokens; task perplexity {result['perplexity']:.2f}",
        f"Time{on}: {most} {duration(cost.loading + cost.training + cost.evaluation + cost.saving)}: {duration(cost.training)} for "
        f"{config.train.iterations} iterations, {duration(cost.evaluation)} of evaluation, {duration(cost.loading + cost.saving)} to load "
        "and save",
        _of_an_iteration(cost, length["mean"]),
        f"Memory{each}: {size(cost.memory)} so far, {size(cost.optimizer)} of it for the optimizer's state"
        if cost.device_memory is None
        else f"Memory{each}: {size(cost.device_memory)} on the GPU, {size(cost.optimizer)} of it for the optimizer's state; "
        f"{size(cost.memory)} on the host",
    ]
    for line in lines:
        say(console, line)


def _of_an_iteration(cost: Cost, now: float) -> str:
    shares = {name: value / cost.iteration for name, value in cost.phases.items() if name != "iteration"}
    parts = ", ".join(
        f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 0.005
    )
    text = f"An iteration: {cost.iteration:.2g} s now ({parts})"
    if cost.phases["sampling"]:
        text += (
            f", {cost.settled:.2g} s when responses have gone from {now:.0f} to {cost.tokens:.0f} tokens, as data and bounds have it; "
            f"if they stay as long as now the iterations take {duration(cost.training_as_now)}"
        )
    return text


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """`120 MiB`, `2.3 GiB`"""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
