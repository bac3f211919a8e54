"""`l3ms plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l3ms.commands.options import Debug


def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Draw report.png again from a run's metrics.jsonl and report.json."""
    from l3ms.runs.report import plot_run

    typer.echo(plot_run(run))
