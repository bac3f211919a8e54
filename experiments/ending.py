"""How a command of experiments/ ends: what is wrong in one line on stderr, and an exit code."""

from __future__ import annotations

import sys

import typer

from l3ms.config.yaml_reader import ConfigError


def run(
    app: typer.Typer,
    arguments: list[str] | None,
    *,
    program: str,
    name: str,
    again: str,
    bad_input: tuple[type[Exception], ...] = (ConfigError,),
) -> int:
    """The exit code: 2 for bad input, 1 where cells have failed, 130 where it was interrupted (`again` says how it goes on).

    program: as usage lines have it; name: what a line on stderr begins with.
    """

    def fail(message: str, code: int) -> int:
        print(f"{name}: {message}", file=sys.stderr)
        return code

    try:
        app(arguments, prog_name=program, standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return fail(f"interrupted; {again}", 130)
    except bad_input as error:
        return fail(str(error), 2)
    except RuntimeError as error:
        return fail(str(error), 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # wrong use of the command line, from typer
            raise
        return fail(error.format_message(), 2)  # pyright: ignore[reportAttributeAccessIssue]
    return 0
