"""The command `l3ms`.

Bad input ends with one line that names the field and exit code 2; a full disk with exit code 5; `--debug` shows the
traceback. Several processes of one run say it once, and end alike (`launching`). torch and transformers are imported only by
the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from importlib import metadata
from typing import Annotated

import typer

from l3ms.commands import bench, certify, check, demo, launching, plot, train
from l3ms.commands.ending import INTERRUPTED, explain
from l3ms.commands.options import Debug, literal

app = typer.Typer(
    name="l3ms",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a language model on a task [bold]while it meets constraints[/bold] on its own responses.\n\n"
    "A constraint bounds the mean of a reward: the length of responses, or any function of yours. "
    "It is met by a logarithmic barrier: no penalty weights to tune, no second model in memory.",
    epilog="Start with [bold]l3ms demo[/bold] (minutes on a CPU, downloads nothing), then write a YAML file for "
    "[bold]l3ms train[/bold]: see [bold]l3ms train --help[/bold].",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Debug = False,
) -> None:
    if version:
        typer.echo(f"l3ms {_version()}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _version() -> str:
    try:
        return metadata.version("l3m-kernels")
    except metadata.PackageNotFoundError:
        return "(run from a source tree that is not installed)"


app.command(help=literal(train.HELP))(train.train)
app.command(help=literal(demo.HELP))(demo.demo)
app.command()(plot.plot)
app.command(help=literal(check.HELP))(check.check)
app.command(help=literal(certify.HELP))(certify.certify)
app.command(help=literal(bench.HELP))(bench.bench)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code, having said in one line what went wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    command = next((word for word in arguments if not word.startswith("-")), "")
    try:
        place = launching.place_of(arguments, command)
        if place is not None:
            return launching.together(place, lambda: _run(arguments, command), debug=debug)
        if not launching.silent():
            return _run(arguments, command)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            return _run(arguments, command)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug=False)
    except Exception as error:
        return _fail(*explain(error), debug)


def _run(arguments: list[str], command: str) -> int:
    """The exit code of a command; raises what goes wrong."""
    overrides: list[tuple[str, str]] = []
    if command in ("train", "check"):
        named = train.NAMED if command == "train" else frozenset()
        arguments, overrides = train.split_overrides(arguments, named)
        if command == "train" and {"-h", "--help"} & set(arguments):
            registered = next(item for item in app.registered_commands if item.callback is train.train)
            registered.help = literal(train.help_with_fields())
    code = app(arguments, prog_name="l3ms", standalone_mode=False, obj=overrides)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int, debug: bool) -> int:
    if launching.silent():  # rank 0 says the same
        return code
    if debug:
        traceback.print_exc()
    print(f"l3ms: {' '.join(message.split())}", file=sys.stderr)
    return code
