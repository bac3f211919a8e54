"""`l3ms demo`: plain fine-tuning and constrained fine-tuning of the same small model, side by side, in a few minutes on a CPU.

Task: answer a Python signature with its docstring. Constraint: the mean response length lies in [min, max] tokens.
"""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from l3ms.demo import base
from l3ms.demo.comparison import Demo, check_options, compare, drawn, quiet
from l3ms.demo.settings import Settings
from l3ms.runs.folder import alone_in, check_output, prepare_output, save_weights


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
        ConfigError: bounds or a seed that make no sense, or an output folder that holds something.
    """
    start = time.monotonic()
    settings, console, folder = settings or Settings(), console or Console(), Path(output)
    check_options(min, max, settings.max_new_tokens, seed)
    check_output(folder, overwrite=overwrite)
    quiet()
    ready = prepare_base(recipe, console)
    with alone_in(folder):
        prepare_output(folder)
        (folder / "demo_inputs").mkdir()
        save_weights(folder / "demo_inputs", "base", ready.model, ready.tokenizer)
        length = {"type": "length", "name": "length", "min": min, "max": max}
        demo = Demo(
            folder,
            drawn(ready.train_pairs, 2 * settings.pairs, seed),
            ready.held_out_pairs,
            {"model": "demo_inputs/base", "constraints": [length], **settings.values(seed)},
            settings.max_length,
            settings.shown,
            facts={"base_from_cache": ready.from_cache},
        )
        return compare(demo, started=start, console=console)


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
