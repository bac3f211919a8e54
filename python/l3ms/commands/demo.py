"""`l3ms demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l3ms.commands.options import Debug, Overwrite

HELP = """Teach a small model to write docstrings of 12 to 16 tokens on average, on this machine, in a few minutes.

Nothing is downloaded: the task is mined from the docstrings of the installed Python packages, and a small Llama is \
pre-trained on them once and cached. Plain fine-tuning (SFT) and the constrained one (L3M) then start from the same \
weights, and a table and a picture compare them.

\b
    l3ms demo
    l3ms demo --min 40 --max 50 --output out/long
"""


def demo(
    minimum: Annotated[float, typer.Option("--min", help="Lower bound on the mean response, tokens.")] = 12,
    maximum: Annotated[float, typer.Option("--max", help="Upper bound on the mean response, tokens.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data order, sampling and weights.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo"),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Options to a demo."""
    from l3ms.demo.run import main as run_demo

    run_demo(min=minimum, max=maximum, seed=seed, output=output, overwrite=overwrite)
