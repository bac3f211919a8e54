"""Lines for a person."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print text that is not all ours: as it is, without markup, on one line however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
