"""What `python experiments/run.py NAME` does: run an experiment's cells, then make its table and its picture from their logs.

NAME is a folder with an experiment.yaml below this one: `length`, or `real/length`.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from experiments import ending, inputs, published
from experiments.cells import Outcome, cores, run_cells
from experiments.grid import Cell, Experiment, assign, check_packages, expand, fill, read_experiment
from experiments.results import Result, failed_lines, read_results
from l3ms.config.run_config import load_config, parse_override
from l3ms.config.yaml_reader import ConfigError
from l3ms.model.autocasting import has_bfloat16_products

ROOT = Path(__file__).resolve().parent
PUBLISHED = ("table.md", "figure.png", published.RESULTS, published.RUNS)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command()
def main(
    name: Annotated[
        str, typer.Argument(help="A folder below experiments/ with an experiment.yaml.", show_default=False)
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; each gets its share of the cores.")] = 2,
    seeds: Annotated[str | None, typer.Option(help="0,1,2 for all cells, whatever the experiment says.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id, instead of the demo's base.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with its task: prompt and completion, or messages.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="The model of real/... may be downloaded (93 MB, once).")] = False,
    output: Annotated[Path | None, typer.Option(help="Default: out/experiments/NAME.")] = None,
    only: Annotated[str | None, typer.Option(help="Pattern of cell names: 'barrier_*'.")] = None,
    config: Annotated[Path | None, typer.Option(help="Another experiment.yaml: other bounds, a larger model.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE in every cell: train.iterations=20.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Of each certificate, instead of the experiment's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the cells that are finished, go on with the others.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run every cell again.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Run nothing: table and picture of what is there.")] = False,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Run only what experiments/NAME/results lacks, and add it to that table.")
    ] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Copy them to experiments/NAME/results.")] = False,
) -> None:
    """Train and certify the cells of an experiment, then make OUTPUT/table.md, figure.png and results.json from their logs.

    [bold]python experiments/run.py length --jobs 2[/bold]
    """
    start = time.monotonic()
    console = Console()
    place = _place(name)
    folder = (output or Path("out/experiments") / place.relative_to(ROOT)).resolve()
    experiment = read_experiment(config or place / "experiment.yaml")
    check_packages(experiment)
    cells = expand(experiment, seeds=_seeds(seeds), only=only)
    if not (resume or overwrite or draw) and (folder / "cells").exists():
        raise ConfigError(
            "output", f"{folder} has cells of an earlier run: --resume keeps the finished ones, --overwrite none"
        )
    arguments = inputs.Arguments(model, data, experiment.rows, yes=yes)
    console.print(f"{experiment.title}: {len(cells)} cells", markup=False, highlight=False)
    values = {**_given(place), **_prepare(place)(folder / "inputs", arguments)}
    ready = [_ready(cell, experiment, values, set_ or [], samples) for cell in cells]
    contents = published.contents(values)
    ready = [
        replace(made, identity=published.identity({"cell": cell.config, "set": set_ or []}, made.certify, contents))
        for cell, made in zip(cells, ready, strict=True)
    ]
    known = published.read(place / "results", ready) if go_on else {}
    outcomes: list[Outcome] = []
    if not draw:
        if overwrite:
            shutil.rmtree(folder / "cells", ignore_errors=True)
        if known:
            console.print(f"{len(known)} of them are published, with the same settings and data", highlight=False)
        outcomes = run_cells(
            [cell for cell in ready if cell.key not in known],
            folder,
            jobs=jobs,
            allow_code=experiment.allow_code,
            console=console,
        )
    errors = {outcome.cell.key: outcome.error for outcome in outcomes if outcome.error}
    results = read_results(ready, folder, experiment.reference, known)
    if not results:
        raise RuntimeError(f"no cell has finished; their logs are in {folder / 'cells'}")
    facts = {"title": experiment.title, "inputs": _shown(values, folder), **_machine(jobs)}
    if not draw and not any(outcome.skipped for outcome in outcomes):
        facts["seconds"] = round(time.monotonic() - start)
    published.write(results, folder, facts, texts=experiment.publish_texts)
    present(place, results, folder, facts, failed_lines(ready, results, errors))
    console.print((folder / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    if publish:
        (place / "results").mkdir(exist_ok=True)
        for item in PUBLISHED:
            shutil.copy(folder / item, place / "results" / item)
    where = place / "results" if publish else folder
    console.print(f"{', '.join(PUBLISHED)} in {where}", markup=False, highlight=False, soft_wrap=True)
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(cells)} cells failed; --resume tries them again")


def present(place: Path, results: list[Result], folder: Path, facts: dict[str, Any], notes: list[str]) -> None:
    """`table.md` and `figure.png` by the experiment's `draw.py`: `table(results) -> str`, `figure(results) -> Figure`."""
    module = importlib.import_module(_module(place, "draw"))
    lines = [f"# {facts['title']}", "", module.table(results).rstrip(), ""]
    if notes:
        lines += ["## What did not finish", "", *notes, ""]
    (folder / "table.md").write_text("\n".join(lines), encoding="utf-8")
    module.figure(results).savefig(folder / "figure.png", dpi=85)


def _ready(
    cell: Cell, experiment: Experiment, values: dict[str, Any], settings: list[str], samples: int | None
) -> Cell:
    """The cell with its values filled in, checked as `l3ms train` will check it: nothing runs while one is wrong."""
    settled = fill(cell.config, values)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError("--set", f"wanted FIELD=VALUE, got {setting!r}")
        assign(settled, *parse_override(name, text))
    settled.setdefault("output", "unused")  # the runner names the folder
    wanted = cell.certify if samples is None or cell.certify is None else samples
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        path.write_text(yaml.safe_dump(settled), encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            raise ConfigError(f"cell {cell.key}, {error.field}", error.message) from None
    return Cell(cell.name, cell.labels, cell.seed, settled, wanted)


def _given(place: Path) -> dict[str, Any]:
    """What every experiment may use, whatever its inputs are."""
    return {"here": str(place), "bfloat16": has_bfloat16_products()}


def _prepare(place: Path) -> Callable[[Path, inputs.Arguments], dict[str, Any]]:
    """The experiment's own, or the usual inputs where it has none."""
    if not (place / "prepare.py").exists():
        return inputs.prepare
    return importlib.import_module(_module(place, "prepare")).prepare


def _place(name: str) -> Path:
    """The experiment's folder, from one of the names that there are: no other path leads to a folder."""
    known = {path.parent.relative_to(ROOT).as_posix(): path.parent for path in ROOT.rglob("experiment.yaml")}
    if name not in known:
        raise ConfigError("NAME", f"{name!r} is no experiment; there are {', '.join(sorted(known))}")
    return known[name]


def _module(place: Path, name: str) -> str:
    return ".".join(("experiments", *place.relative_to(ROOT).parts, name))


def _shown(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Without the paths of this machine."""

    def short(value: Any) -> Any:
        if not isinstance(value, str) or not os.path.isabs(value):
            return value
        inside = f"{folder}{os.sep}"
        return value.removeprefix(inside) if value.startswith(inside) else Path(value).name

    return {key: short(value) for key, value in values.items() if key != "here"}


def _machine(jobs: int) -> dict[str, Any]:
    import torch
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"jobs": jobs, "cores": cores(), "versions": versions}


def _seeds(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--seeds", f"wanted numbers with commas between, got {text!r}") from None


def run(arguments: list[str] | None = None) -> int:
    """The exit code, see `ending`."""
    return ending.run(app, arguments, program="experiments/run.py", name="experiments", again="--resume goes on")
