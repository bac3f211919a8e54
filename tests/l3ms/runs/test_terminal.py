"""What strangers wrote is shown on a terminal, not obeyed."""

import io

import pytest
from rich.console import Console

from l3ms.commands.ending import MOST, explain
from l3ms.runs.terminal import printable, say

OBEYED = ["\x1b[2J", "\x9b2J", "\x07", "\x08", "\r", "\x00", "\x7f", "\u202e", "\u2066", "\u200b", "\ud800"]


@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_a_line_of_an_error_and_a_line_that_is_said_hold_no_control_character(text):
    line, _ = explain(ValueError(f"a{text}b: wrong"))
    assert line.isprintable()
    assert line.startswith("a")
    file = io.StringIO()
    say(Console(file=file, force_terminal=True, width=80), f"[bold]a{text}b\nl3ms: fine")
    assert file.getvalue().removesuffix("\n").isprintable()
    assert file.getvalue().startswith("[bold]a")


def test_what_can_be_read_stays_as_it_is():
    for text in ("é ½ 漢字 💥", "a b: 'c' [d]", "μ 0.1 ± 2"):
        assert printable(text) == text
    assert printable("a\x1b[1m\n\u202eb") == r"a\x1b[1m\n\u202eb"


def test_a_line_has_an_end():
    line, _ = explain(ValueError("field: " + "x" * 10**6 + " the way out"))
    assert len(line) <= MOST
    assert line.startswith("field: x")
    assert line.endswith("the way out")
