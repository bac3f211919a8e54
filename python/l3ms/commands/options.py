"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Allow importing the reward functions that the configuration names.")
]


def wide_console() -> Any:
    """The terminal; where there is none, lines of 160 characters, since tables would be folded at 80."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)
