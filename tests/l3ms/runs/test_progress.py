"""What is said of work that takes long, in a terminal and in a log file."""

import io

import pytest
from rich.console import Console

from l3ms.runs.progress import progress_bar


def logged(title, steps, total, **options):
    console = Console(file=io.StringIO(), width=40)
    with progress_bar(console, title, **options) as advance:
        for done in steps:
            advance(done, total)
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("steps", "total", "said"),
    [
        (range(64, 513, 64), 512, [128, 256, 384, 512]),
        (range(1, 101), 100, [25, 50, 75, 100]),
        ([16], 16, [16]),
        ([2, 3], 3, [2, 3]),
        ([100, 130], 130, [100, 130]),
        ([], 0, []),
    ],
)
def test_a_log_file_gets_a_line_now_and_then(steps, total, said):
    assert logged("sampling, average", steps, total) == [f"sampling, average: {done}/{total}" for done in said]


def test_slow_work_is_heard_of_between_these(monkeypatch):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr("l3ms.runs.progress.time.monotonic", lambda: next(clock))
    assert logged("sampling", range(1, 7), 1000) == ["sampling: 3/1000", "sampling: 6/1000"]


def test_a_line_is_not_folded_and_has_no_markup():
    title = "sampling [red]many[/red] responses to [/] held-out prompts"
    assert logged(title, [4], 4) == [f"{title}: 4/4"]


def test_a_terminal_gets_a_bar_that_goes():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(console, "sampling [x]") as advance:
        advance(3, 4)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "sampling [x]" in text
    assert "sampling [x]: " not in text
