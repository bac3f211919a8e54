"""`python experiments/versus/run.py`: L3M against what people use, see README.md."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from experiments import ending, inputs  # noqa: E402
from experiments.cells import cores  # noqa: E402
from experiments.versus import contest as contests  # noqa: E402
from experiments.versus.outcomes import outcomes, read_results, tuned, write_results  # noqa: E402
from experiments.versus.prepare import prepare  # noqa: E402
from experiments.versus.running import is_certified, is_finished, run_cells  # noqa: E402
from experiments.versus.table import table  # noqa: E402
from l3ms.config.yaml_reader import ConfigError  # noqa: E402

HERE = Path(__file__).resolve().parent
ROWS = 2000  # to train on: more than any contestant takes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; each gets its share of the cores.")] = 2,
    seeds: Annotated[
        str | None,
        typer.Option(help="0,1,2 instead of the grid's: all tries with the first, the best ones with the others."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Contestants, patterns with commas: 'l3m,trl_*'.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Of each training, instead of the grid's.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Of each verdict, instead of the grid's.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id, instead of the real model's.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with its task: prompt and completion, or messages.")] = None,
    config: Annotated[Path | None, typer.Option(help="Another grid.yaml.")] = None,
    output: Annotated[Path, typer.Option(help="What is finished there is kept.")] = Path("out/experiments/versus"),
    yes: Annotated[bool, typer.Option("--yes", help="The real model may be downloaded.")] = False,
    first: Annotated[
        bool, typer.Option("--first", help="No more tries of a contestant once one is certified.")
    ] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Run nothing: tables of what is there.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Copy them to experiments/versus/results.")] = False,
) -> None:
    """Train and judge every contestant with each of its settings, the best of them again with other seeds, then write OUTPUT/table.md and
    results.json. Called again, it goes on.
    """
    console, folder = Console(), output.resolve()
    contest = contests.read_contest(config or HERE / "grid.yaml")
    if samples is not None:
        contest = contest.model_copy(update={"judge": contest.judge.model_copy(update={"samples": samples})})
    names = contests.chosen(contest, only)
    if not draw:
        contests.check_installed(contest, names)
    values = prepare(folder / "inputs", inputs.Arguments(model, data, ROWS), yes=yes, console=console)
    task = values | ({} if iterations is None else {"iterations": iterations})
    chosen = _seeds(seeds) or contest.seeds
    cells: list[contests.Cell] = []
    errors: dict[str, str] = {}
    tries = None
    for some in filter(None, (chosen[:1], chosen[1:])):  # tuned with the first seed, tried again with the others
        own = contests.cells(contest, names, task, folder, some, tries)
        console.print(f"{contest.title}: {len(own)} cells in {folder}", markup=False, highlight=False, soft_wrap=True)
        errors |= {} if draw else run_cells(own, folder, jobs=jobs, console=console, first=first)
        tries = tuned(own, read_results(own, folder, contest.reference))
        cells += own
    results = read_results(cells, folder, contest.reference)
    if not results:
        raise RuntimeError(f"no cell has finished; their logs are in {folder / 'cells'}")
    found = outcomes(cells, results)
    text = table(contest, cells, results, found)
    missing = [
        f"* `{cell.key}`: {errors.get(cell.key, 'not run')}"
        for cell in cells
        if not is_finished(cell, folder) and not is_certified(cells, cell, folder)
    ]
    if missing:
        text += "\n".join(["", "## What did not finish", "", *missing, ""])
    (folder / "table.md").write_text(text, encoding="utf-8")
    facts = {"title": contest.title, "jobs": jobs, "cores": cores(), "contest": contest.model_dump()}
    write_results(results, found, facts, folder / "results.json")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if publish:
        (HERE / "results").mkdir(exist_ok=True)
        for name in ("table.md", "results.json"):
            shutil.copy(folder / name, HERE / "results" / name)
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(cells)} cells failed; the same command tries them again")


def _seeds(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--seeds", f"wanted whole numbers with commas between them, got {text!r}") from None


def run(arguments: list[str] | None = None) -> int:
    """The exit code, see `ending`."""
    bad_input, again = (ConfigError, ModuleNotFoundError), "the same command goes on"
    return ending.run(
        app, arguments, program="experiments/versus/run.py", name="versus", again=again, bad_input=bad_input
    )


if __name__ == "__main__":
    sys.exit(run())
