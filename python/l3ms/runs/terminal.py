"""Lines for a person. What strangers wrote (names of files, keys, cells, tokens) may hold what a terminal obeys: it is shown, not sent."""

from rich.console import Console


def printable(text: str) -> str:
    """Escape sequences, backspaces, line ends, marks that turn the direction of writing: each as its escape, as Python writes it."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


def say(console: Console, text: str) -> None:
    """Print text that is not all ours: as it is, without markup, on one line however long."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
