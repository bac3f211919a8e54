"""Progress of a training run: a bar in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from l3ms.constraints.shares import bounds_of
from l3ms.runs.labels import bounds_text, constraint_label

Z95 = 1.959964


class ProgressCallback(TrainerCallback):
    """Shows iteration, task loss, mu, and each constraint's estimate (with 95% half-width) beside its bounds.

    `bounds` holds `{"name", "min", "max", ...}` per constraint, as a report. Without a terminal, about `lines` plain lines are printed
    over the run, and at least one every `every` seconds.
    """

    def __init__(
        self,
        bounds: Sequence[Mapping[str, Any]] = (),
        *,
        title: str = "training",
        console: Console | None = None,
        lines: int = 20,
        every: float = 60.0,
    ):
        self.bounds = list(bounds)
        self.title = title
        self.console = console or Console()
        self.lines, self.every = lines, every
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = -math.inf

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(),
            console=self.console,
        )  # fmt: skip
        self._task = self._progress.add_task(escape(self.title), total=state.max_steps, status="")
        self._progress.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        text = status(logs, self.bounds)
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, status=escape(text))
            return
        now = time.monotonic()
        step, total = state.global_step, state.max_steps
        if step in {1, total} or step % max(1, total // self.lines) == 0 or now - self._last_line > self.every:
            self._last_line = now
            line = f"{self.title} {state.global_step}/{state.max_steps}  {text}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; safe to call twice, and after an interrupted run."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def progress_bar(
    console: Console, title: str, *, lines: int = 4, every: float = 60.0
) -> Iterator[Callable[[int, int], None]]:
    """`with progress_bar(console, "sampling") as advance: advance(done, total)`.

    Without a terminal a plain line, `sampling: 128/512`, `lines` times over the whole, and where `every` seconds have passed.
    """
    if not console.is_terminal:
        yield _plain_lines(console, title, lines, every)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(escape(title), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _plain_lines(console: Console, title: str, lines: int, every: float) -> Callable[[int, int], None]:
    part, last = 0, time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal part, last
        reached, now = lines * done // max(total, 1), time.monotonic()
        if reached > part or now - last > every:
            part, last = reached, now
            console.print(f"{title}: {done}/{total}", markup=False, highlight=False, soft_wrap=True)

    return advance


def status(logs: Mapping[str, Any], bounds: Sequence[Mapping[str, Any]]) -> str:
    """`loss 2.913  length 18.3 ± 0.6 in [12, 16]  μ 0.21` from one iteration's metrics; what is missing is left out."""
    parts = [f"loss {float(logs['loss']):.3f}"] if "loss" in logs else []
    for item in bounds:
        estimate = logs.get(f"constraints/{item['name']}/estimate")
        if estimate is None:
            continue
        half = Z95 * float(logs.get(f"constraints/{item['name']}/stderr") or 0.0)
        wanted = bounds_text(*bounds_of(item))
        parts.append(f"{constraint_label(item)} {float(estimate):.3g} ± {half:.2g} {wanted}".rstrip())
    if logs.get("l3m/mu") is not None:
        parts.append(f"μ {float(logs['l3m/mu']):.2g}")
    return "  ".join(parts)
