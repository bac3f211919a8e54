"""`l3ms demo`: plain fine-tuning and constrained fine-tuning of the same small model, side by side, in a few minutes on a CPU.

Task: answer a Python signature with its docstring. Constraint: the mean response length lies in [min, max] tokens. Both runs start from the
same pre-trained base and take the same task steps; fresh responses to held-out prompts then say what came of it.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Length
from l3ms.demo import base
from l3ms.demo.corpus import Pair
from l3ms.demo.inputs import write_inputs
from l3ms.demo.settings import Settings
from l3ms.measuring.evaluation import Evaluation, evaluate
from l3ms.runs.data import Example, encode
from l3ms.runs.folder import MetricsWriter, check_output, prepare_output, save_weights
from l3ms.runs.progress import ProgressCallback, progress_bar
from l3ms.runs.report import examples_table, summary_table, write_report
from l3ms.runs.terminal import say
from l3ms.training.arguments import L3MConfig
from l3ms.training.trainer import L3MTrainer


def main(
    min: float = 12,
    max: float = 16,
    seed: int = 0,
    output: str | Path = "out/demo",
    overwrite: bool = False,
    *,
    settings: Settings | None = None,
    recipe: base.Recipe | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo and return its report; `output` then holds report.json, report.png, metrics, and the models.

    Raises:
        ConfigError: bounds that make no sense, or an output folder that holds something.
    """
    start = time.monotonic()
    settings, console, folder = settings or Settings(), console or Console(), Path(output)
    constraint = _constraint(min, max, settings)
    check_output(folder, overwrite=overwrite)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ready = prepare_base(recipe, console)
    prepare_output(folder)

    rows = settings.iterations * settings.batch_size * 2
    write_inputs(folder, ready, _drawn(ready.train_pairs, rows, seed), min, max, seed, settings)
    train = _rows(ready, ready.train_pairs, settings, limit=rows, seed=seed)
    held_out = _rows(ready, ready.held_out_pairs, settings, limit=settings.samples)
    bounds = [{"name": "length", "min": min, "max": max}]
    found: dict[str, Evaluation] = {}

    def sample(key: str, model: Any) -> None:
        save_weights(folder, _FOLDERS[key], model, ready.tokenizer)
        with progress_bar(console, f"sampling {len(held_out)} responses to held-out prompts: {key}") as advance:
            options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "batch_size": 128, "seed": seed}
            found[key] = evaluate(model, ready.tokenizer, held_out, progress=advance, **options)

    def callbacks(metrics: str, title: str, shown: list[dict[str, Any]]) -> list[Any]:
        return [MetricsWriter(folder / metrics), ProgressCallback(shown, title=title, console=console)]

    plain = _trainer("none", ready, train, constraint, settings, seed, folder, callbacks("sft.jsonl", "SFT", []))
    plain.train()
    sample("sft", plain.model)
    ours = _trainer(
        "barrier", ready, train, constraint, settings, seed, folder, callbacks("metrics.jsonl", "L3M", bounds)
    )
    ours.train()
    sample("last", ours.model)
    sample("average", ours.averaged_model())
    assert ours.l3m_optimizer is not None
    report = {
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "base_from_cache": ready.from_cache,
        "iterations": settings.iterations,
        "solver": "barrier",
        "bounds": {"min": min, "max": max},
        "constraints": bounds,
        "average_from": ours.average_from,
        "skipped_steps": ours.l3m_optimizer.skipped_steps,
        "mu_end": float(ours.l3m_optimizer.mu),
        "examples": _examples(held_out, found, settings.shown),
        **{key: evaluation.summary for key, evaluation in found.items()},
    }
    picture = write_report(folder, report, {key: evaluation.lengths for key, evaluation in found.items()})
    console.print(summary_table(report), examples_table(report["examples"], report))
    say(console, f"Report and picture: {picture.with_suffix('.json')}, {picture}")
    say(console, f"A verdict from fresh samples: l3ms certify {folder}")
    return report


_FOLDERS = {"sft": "sft", "last": "model", "average": "average"}


def _constraint(low: float, high: float, settings: Settings) -> Length:
    for name, value in (("min", low), ("max", high)):
        if not (math.isfinite(value) and 1 <= value <= settings.max_new_tokens):
            raise ConfigError(name, f"must be between 1 and {settings.max_new_tokens} tokens, got {value:g}")
    if low >= high:
        raise ConfigError("min", f"must be below max, got {low:g} and {high:g}")
    return Length(low, high)


def prepare_base(recipe: base.Recipe | None, console: Console) -> base.Base:
    """The base, with a bar for each stage of making it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, note: str) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, note="")
            progress.update(stages[stage], completed=done, total=total, note=note)

        ready = base.prepare(show, recipe=recipe)
    console.print(
        f"{len(ready.train_pairs)} docstrings to learn from, {len(ready.held_out_pairs)} held out; "
        f"base model of {sum(p.numel() for p in ready.model.parameters()) / 1e6:.2f}M parameters"
        f"{' from the cache' if ready.from_cache else ''}",
        highlight=False,
    )
    return ready


def _rows(
    ready: base.Base, pairs: Sequence[Pair], settings: Settings, limit: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Token rows of pairs drawn in an order of the seed."""
    examples = [Example(pair.prompt, pair.response) for pair in _drawn(pairs, 2 * limit, seed)]
    encoded = encode(examples, ready.tokenizer, max_length=ready.model.config.max_position_embeddings)
    return [row for row in encoded.rows if len(row["input_ids"]) <= settings.max_length][:limit]


def _drawn(pairs: Sequence[Pair], limit: int, seed: int) -> list[Pair]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pairs[i] for i in order[:limit]]


def _trainer(
    solver: str,
    ready: base.Base,
    rows: list[dict[str, Any]],
    constraint: Length,
    settings: Settings,
    seed: int,
    folder: Path,
    callbacks: list[Any],
) -> L3MTrainer:
    model = transformers.AutoModelForCausalLM.from_config(ready.model.config)
    model.load_state_dict(ready.model.state_dict())
    model.generation_config = ready.model.generation_config
    arguments = L3MConfig(
        output_dir=str(folder),
        solver=solver,
        seed=seed,
        max_steps=settings.iterations,
        per_device_train_batch_size=settings.batch_size,
        constraint_batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        learning_rate=settings.learning_rate,
        adam_beta2=0.95,
        weight_decay=0.0,
        warmup_steps=settings.warmup,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": settings.learning_rate / 10, "power": 1.0},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = L3MTrainer(
        model,
        arguments,
        constraints=[constraint],
        train_dataset=rows,
        processing_class=ready.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _examples(rows: Sequence[dict[str, Any]], found: dict[str, Evaluation], count: int) -> list[dict[str, str]]:
    """The first held-out prompts with what plain and constrained fine-tuning answer."""
    keys = ("sft", "average")
    return [
        {"prompt": row["prompt"], **{key: found[key].completions[i] for key in keys}}
        for i, row in enumerate(rows[:count])
    ]
