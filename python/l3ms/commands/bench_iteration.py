"""`l3ms bench --op iteration`: the model and data that are asked for, and the measurement. It stands here, where both rooms may be used."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from l3ms.config.yaml_reader import ConfigError

if TYPE_CHECKING:
    from l3ms.benchmark.iterations import Work
    from l3ms.benchmark.run import Plan

ROWS = 512  # of the data, at most


def check_options(op: list[str], others: Mapping[str, Any], contestants: tuple[str, ...]) -> None:
    """ConfigError for what is of the head's ops alone, or of no contestant."""
    from l3ms.benchmark.iterations import TITLES

    if len(op) > 1:
        raise ConfigError("--op", f"iteration is measured by itself, got {', '.join(op)}")
    if given := [option for option, value in others.items() if value]:
        raise ConfigError("--op", f"iteration takes no {', '.join(given)}: those are of the head's ops")
    if wrong := next((name for name in contestants if name not in TITLES), None):
        raise ConfigError("--contestants", f"must be one of {', '.join(TITLES)}, got {wrong!r}")


def execute(plan: Plan, model: str, yes: bool, console: Console) -> None:
    """Measure, show the table, write what the plan asks for."""
    from l3ms.benchmark import iterations, run, tables

    results, target = run.begin(plan, "-iteration")
    with tempfile.TemporaryDirectory() as folder:
        work = _work(model, yes, Path(folder), console)
        names = plan.contestants or tuple(iterations.TITLES)
        with run.progress(console, (plan.rounds + 1) * len(names)) as said:
            found = iterations.measure(
                work, rounds=plan.rounds, seed=plan.seed, device=plan.device, contestants=names, console=console,
                said=lambda name: said(f"{work.name}: {name}"),
            )  # fmt: skip
    results.add_iteration(found)
    run.save(results, plan, target)
    console.print(tables.terminal(tables.iteration_grid(found)))
    console.print(tables.machine(results), style="dim", highlight=False)


def _work(model: str, yes: bool, folder: Path, console: Console) -> Work:
    """The demos' models with the demos' tasks; any other model with that of the real one."""
    from l3ms.benchmark.iterations import Work
    from l3ms.demo import real, real_model
    from l3ms.demo.comparison import drawn, quiet
    from l3ms.demo.run import prepare_base
    from l3ms.runs.folder import save_weights

    quiet()
    if model == "demo":
        base = prepare_base(None, console)
        save_weights(folder, "base", base.model, base.tokenizer)
        return Work("the demo's model", str(folder / "base"), drawn(base.train_pairs, ROWS, 0))
    source = str(real_model.prepare(yes=yes, console=console)) if model == "real" else model
    name = real_model.SMOLLM2.model if model == "real" else Path(model).name
    pairs = drawn(real.pairs()[0], ROWS, 0)
    return Work(name, source, pairs, batch=8, max_new_tokens=40, max_length=112, lora=8)
