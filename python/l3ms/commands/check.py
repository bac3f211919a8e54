"""`l3ms check`. torch is imported when the configuration has been read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l3ms.commands import launching
from l3ms.commands.options import AllowCode, Debug, wide_console

HELP = """Try CONFIG without training: load everything, sample a few responses, time a few iterations. Nothing is kept.

For each constraint: the range of its rewards, values that are missing or not finite, where the untrained model stands, the probability \
that it is feasible already, and the share of responses that are within the bounds singly. Then the time and memory that the run will \
take, if its responses become as long as those of the data, within the bounds on their mean length.

\b
    l3ms check short.yaml
    l3ms check short.yaml --samples 256 --json check.json
    l3ms check short.yaml --train.dtype bfloat16 --constraints.0.max 60     # fields by flags, as in train

Exit code 2, and the field, for whatever would stop [bold]l3ms train[/bold].
""" + launching.HELP.format(command="check run.yaml")


def check(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.", show_default=False)],
    samples: Annotated[int, typer.Option(min=2, help="Responses of the untrained model.")] = 64,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was found.", show_default=False)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="As in train: an earlier run in the output folder is no obstacle.")
    ] = False,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Options to a dry run."""
    from l3ms.config.named_files import check_writable
    from l3ms.config.run_config import load_config, parse_override

    if json is not None:
        check_writable("--json", json)
    settings = load_config(config, [parse_override(flag, text) for flag, text in context.obj or []])

    from l3ms.verdicts.checking import check as execute

    execute(settings, samples=samples, json=json, overwrite=overwrite, allow_code=allow_code, console=wide_console())
