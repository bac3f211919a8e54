"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Allow importing the reward functions that the configuration names.")
]


def literal(text: str) -> str:
    """Help that shows every bracket as it is: rich takes `[thank you]` for a style and drops it. [bold] stays one."""
    return escape(text).replace(r"\[bold]", "[bold]").replace(r"\[/bold]", "[/bold]")


def wide_console() -> Any:
    """The terminal; where there is none, lines of 160 characters, since tables would be folded at 80."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)
