"""Fresh responses of a run's models to its held-out prompts, and what they come to in its report."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from l3ms.config.run_config import RunConfig
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.single_answers import SingleAnswers, is_mean_length
from l3ms.constraints.trl_arguments import trl_arguments
from l3ms.measuring.evaluation import evaluate, groups_of, half_width, prompt_key
from l3ms.ranks.group import is_first, of_first
from l3ms.rollouts.engines import Engine
from l3ms.runs.loading import Run
from l3ms.runs.progress import progress_bar
from l3ms.runs.whole_files import write_json


class Samples(NamedTuple):
    """Fresh responses of one model to the held-out prompts, and what they come to."""

    summary: dict[str, Any]
    lengths: list[int]
    prompts: list[Any]
    completions: list[Any]


def evaluator(run: Run, console: Console) -> Callable[[Any, str], Samples]:
    """`sample(model, name)`: the same held-out rows for each model, as many as were asked for."""
    config, held_out = run.config, run.held_out
    order = torch.randperm(len(held_out.rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    rows = [held_out.rows[i] for i in itertools.islice(itertools.cycle(order), config.evaluate.samples)]
    sample = sampler(config, rows, run.tokenizer, run.constraints, console, run.engine)
    return lambda model, name: sample(model, f"sampling, {name}")


def sampler(
    config: RunConfig,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    constraints: Sequence[Constraint],
    console: Console,
    engine: Engine | None = None,
) -> Callable[[Any, str], Samples]:
    """`sample(model, title)`: one response per row, as the configuration has them sampled, by `engine` or the model itself."""
    prompts, keys = [row["prompt"] for row in rows], [prompt_key(row) for row in rows]

    def sample(model: Any, title: str) -> Samples:
        with progress_bar(console, title) as advance:
            found = evaluate(
                model, tokenizer, rows, max_new_tokens=config.train.max_new_tokens, seed=config.seed,
                temperature=config.train.temperature, batch_size=config.evaluate.batch_size, constraints=constraints,
                training=trl_arguments(iteration=config.train.iterations, iterations=config.train.iterations),
                progress=advance, engine=engine, together=True,
            )  # fmt: skip
        rewards = {}
        for item in constraints:
            if item.name in found.rewards:
                rewards[item.name] = _mean(found.rewards[item.name], groups_of(item, keys))
            if is_mean_length(item):
                single = SingleAnswers.of(item, found.lengths, found.summary["ended"])
                rewards[item.name]["single_answers"] = single._asdict()
        return Samples({**found.summary, "constraints": rewards}, found.lengths, prompts, found.completions)

    return sample


def kept(path: Path, run: Run, sample: Callable[[], Samples]) -> Samples:
    """`sample()`, or what it gave when the run was begun: of a run that goes on it is in `path`, if as many samples are wanted."""
    wanted = {"samples": run.config.evaluate.samples, "batch_size": run.config.evaluate.batch_size}

    def before() -> Samples | None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8")) if run.begun else {}
            if kept.get("wanted") == wanted:
                return Samples(**{name: kept[name] for name in Samples._fields})
        except (OSError, ValueError, KeyError, AttributeError):
            pass  # not there, or not whole: it is measured again
        return None

    if (found := of_first(before)) is None:
        found = sample()
        if is_first():
            write_json(path, {"wanted": wanted, **found._asdict()})
    return found


def examples(samples: dict[str, Samples], count: int = 3) -> list[dict[str, str]]:
    """The first prompts with the responses of the models, for the table: of a conversation the last turn."""

    def text(turns: Any) -> str:
        return turns if isinstance(turns, str) else str(turns[-1].get("content") or "")

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
