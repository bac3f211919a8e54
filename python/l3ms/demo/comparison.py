"""What a demo is: plain and constrained fine-tuning of one model on one task, side by side.

Both runs start from the same weights and take the same task steps; fresh responses to held-out prompts then say what came of it. The folder
is that of a run (config.yaml, metrics.jsonl, model/, average/, report.json, report.png) with the plain one beside it (sft.jsonl, sft/).
"""

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from l3ms.config.run_config import RunConfig, load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo.corpus import Pair
from l3ms.runs.arguments import training_arguments
from l3ms.runs.constraints import build_constraints
from l3ms.runs.data import Example, encode
from l3ms.runs.evaluating import Samples, examples, sampler
from l3ms.runs.executing import bounds, wanted
from l3ms.runs.folder import MetricsWriter, save_weights, write_config
from l3ms.runs.models import context_of, load_model, options_of
from l3ms.runs.progress import ProgressCallback
from l3ms.runs.report import examples_table, summary_table, write_report
from l3ms.runs.terminal import say
from l3ms.training.phase_summary import PHASES, seconds_of, summary
from l3ms.training.phases import peak_memory
from l3ms.training.trainer import L3MTrainer

HELD_OUT = 4096  # pairs that are kept for certificates, at most
FOLDERS = {"sft": "sft", "last": "model", "average": "average"}
TITLES = {"none": "SFT", "barrier": "L3M"}


@dataclass(frozen=True)
class Demo:
    """What is compared, in a folder that exists and is empty."""

    folder: Path
    train: Sequence[Pair]  # in an order of the seed
    held_out: Sequence[Pair]
    values: Mapping[str, Any]  # of config.yaml, but for its `output` and `data`
    max_length: int  # tokens; longer rows are left out: a batch costs its longest row
    shown: int = 4  # responses, side by side
    # sampling takes minutes: the last iterate is kept and not sampled, and the model before training answers the shown prompts
    costly: bool = False
    asked: str = ""  # what every prompt begins with, and examples do without
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the report


def check_options(low: float, high: float, max_new_tokens: int, seed: int) -> None:
    """Raise `ConfigError` for bounds on the mean length that no response can meet, and a seed that no run takes."""
    for name, value in (("min", low), ("max", high)):
        if not (math.isfinite(value) and 1 <= value <= max_new_tokens):
            raise ConfigError(name, f"must be between 1 and {max_new_tokens} tokens, got {value:g}")
    if low >= high:
        raise ConfigError("min", f"must be below max, got {low:g} and {high:g}")
    if not 0 <= seed < 2**32:
        raise ConfigError("seed", f"must be from 0 to {2**32 - 1}, got {seed}")


def quiet() -> None:
    """transformers says what we say, and more."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def compare(demo: Demo, *, started: float, console: Console) -> dict[str, Any]:
    """Train and sample both, write the report and show it; `started` is the time.monotonic() that its seconds count from."""
    config = _written(demo)
    found: dict[str, Samples] = {}
    plain = _trainer(demo, config, "none", console)
    before = {"initial": _sampled(demo, config, plain, "initial", demo.shown, console)} if demo.costly else {}
    plain.train()
    found["sft"] = _sampled(demo, config, plain, "sft", config.evaluate.samples, console)
    seconds = {"sft": _seconds_of(plain)}
    del plain  # its weights, before the next one's
    ours = _trainer(demo, config, "barrier", console)
    ours.train()
    if demo.costly:
        save_weights(demo.folder, FOLDERS["last"], ours.model, ours.processing_class)
    else:
        found["last"] = _sampled(demo, config, ours, "last", config.evaluate.samples, console)
    found["average"] = _sampled(demo, config, ours, "average", config.evaluate.samples, console)
    seconds["l3m"] = _seconds_of(ours)
    report = _report(demo, config, ours, found, before) | {
        "seconds": round(time.monotonic() - started, 1),
        "seconds_per_iteration": seconds,
        "threads": torch.get_num_threads(),
        "peak_memory_mib": None if (peak := peak_memory()) is None else round(peak / (1 << 20), 1),
        "time": summary(ours.state.log_history),
    }
    picture = write_report(demo.folder, report, {key: samples.lengths for key, samples in found.items()})
    console.print(summary_table(report), examples_table(report["examples"], report))
    say(console, f"Report and picture: {picture.with_suffix('.json')}, {picture}")
    say(console, f"A verdict from fresh samples: l3ms certify {demo.folder}")
    return report


def drawn(pairs: Sequence[Pair], limit: int, seed: int) -> list[Pair]:
    """`limit` of them, in an order of the seed."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pairs[i] for i in order[:limit]]


def _written(demo: Demo) -> RunConfig:
    """`demo_inputs/` (train.jsonl, held_out.jsonl) and `config.yaml`, read back.

    `l3ms certify FOLDER` then works, and `l3ms train FOLDER/config.yaml --output OTHER` is much the same run (rows longer than
    `max_length` are cut there, and left out here).
    """
    inputs = demo.folder / "demo_inputs"
    inputs.mkdir(exist_ok=True)
    _write(inputs / "train.jsonl", demo.train[: len(demo.train) // 2])
    _write(inputs / "held_out.jsonl", demo.held_out[:HELD_OUT])
    data = {
        "train": "demo_inputs/train.jsonl",
        "evaluation": "demo_inputs/held_out.jsonl",
        "max_length": demo.max_length,
    }
    write_config(demo.folder, {"output": ".", "data": data, **demo.values})
    return load_config(demo.folder / "config.yaml")


def _write(path: Path, pairs: Iterable[Pair]) -> None:
    lines = (json.dumps({"prompt": pair.prompt, "completion": pair.response}, ensure_ascii=False) for pair in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _rows(demo: Demo, pairs: Sequence[Pair], tokenizer: Any, model: Any, limit: int) -> list[dict[str, Any]]:
    encoded = encode([Example(*pair) for pair in pairs], tokenizer, max_length=context_of(model))
    return [row for row in encoded.rows if len(row["input_ids"]) <= demo.max_length][:limit]


def _trainer(demo: Demo, config: RunConfig, solver: str, console: Console) -> L3MTrainer:
    train = config.train.model_copy(update={"solver": solver})
    config = config.model_copy(update={"train": train})
    transformers.set_seed(config.seed)  # of adapters
    tokenizer, model = load_model(config.model, **options_of(config), lora=train.lora, console=console)
    arguments = training_arguments(config)
    arguments.output_dir = str(demo.folder)
    constrained = solver != "none"
    metrics = MetricsWriter(demo.folder / ("metrics.jsonl" if constrained else "sft.jsonl"))
    shown = bounds(config) if constrained else []
    trainer = L3MTrainer(
        model,
        arguments,
        constraints=build_constraints(config, console, tokenizer, model),
        train_dataset=_rows(demo, demo.train, tokenizer, model, len(demo.train) // 2),
        processing_class=tokenizer,
        callbacks=[metrics, ProgressCallback(shown, title=TITLES[solver], console=console)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _sampled(demo: Demo, config: RunConfig, trainer: L3MTrainer, key: str, count: int, console: Console) -> Samples:
    """Responses to the first `count` held-out rows; a model that was trained is kept first."""
    model: Any = trainer.averaged_model() if key == "average" else trainer.model
    tokenizer = trainer.processing_class
    if key in FOLDERS:
        save_weights(demo.folder, FOLDERS[key], model, tokenizer)
    rows = _rows(demo, drawn(demo.held_out, 2 * config.evaluate.samples, 0), tokenizer, model, count)
    sample = sampler(config, rows, tokenizer, trainer.constraints, console)
    return sample(model, f"sampling {len(rows)} responses to held-out prompts: {key}")


def _seconds_of(trainer: L3MTrainer) -> dict[str, float]:
    """An iteration of the mean, by the phases that it has."""
    seconds = seconds_of(trainer.state.log_history)
    means = {name: round(statistics.fmean(seconds[name]), 4) for name in PHASES}
    return {name: mean for name, mean in means.items() if mean}


def _report(
    demo: Demo, config: RunConfig, ours: L3MTrainer, found: Mapping[str, Samples], before: Mapping[str, Samples]
) -> dict[str, Any]:
    assert ours.l3m_optimizer is not None
    shown = examples({**before, **found}, demo.shown)
    return {
        "seed": config.seed,
        **demo.facts,
        "iterations": config.train.iterations,
        "solver": "barrier",
        **wanted(config),
        "average_from": ours.average_from,
        "skipped_steps": ours.l3m_optimizer.skipped_steps,
        "mu_end": float(ours.l3m_optimizer.mu),
        "examples": [{**row, "prompt": row["prompt"].removeprefix(demo.asked)} for row in shown],
        **{key: samples.summary for key, samples in found.items()},
    }
