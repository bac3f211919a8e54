"""Where an iteration's time goes: a clock that is always in exactly one phase, so the phases add up to the iteration.

A phase within another interrupts it: the constraint's seconds are those of its forward and backward, without the sampling and the step that
stand between. What no phase claims (data, callbacks, the log itself) is `other`.

On a CUDA device marks are events on the stream, which say when the device was there and not when the host asked for it. They are read
once they have passed: `iterate` reads those of iterations before, and a line of the log comes after the Trainer has waited for the loss.
So nothing waits for them. On any other device it is the host's time.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch

from l3ms.training.phase_summary import PHASES


class Marks(Protocol):
    """Points in time."""

    def mark(self) -> Any: ...

    def passed(self, mark: Any) -> bool: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


class HostMarks:
    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.mark = now

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class DeviceMarks:
    """Events of the stream that is current."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3


class _Iteration(NamedTuple):
    marks: list[tuple[str, Any]]  # the phases that began, and when
    end: Any
    tokens: int


class Phases:
    """`begin()`; then `with inside("task"): ...` and the like, and `iterate()` after each iteration. Until `begin()` nothing is timed."""

    def __init__(self, device: torch.device | None = None, marks: Marks | None = None):
        self.device = device
        on_device = device is not None and device.type == "cuda"
        self._time: Marks = marks or (DeviceMarks() if on_device else HostMarks())
        self.stop()

    def begin(self) -> None:
        self.stop()
        self._marks = [("other", self._time.mark())]

    def stop(self) -> None:
        """What was timed and not asked for is forgotten."""
        self._marks: list[tuple[str, Any]] = []
        self._tokens = 0
        self._waiting: deque[_Iteration] = deque()
        self._forget()

    def _forget(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._sampled = self._count = 0

    @property
    def running(self) -> bool:
        return bool(self._marks)

    @property
    def now(self) -> str:
        return self._marks[-1][0] if self._marks else "other"

    def switch(self, name: str) -> str:
        """Into another phase; -> the one that has ended."""
        if not self.running:
            return name
        before = self._marks[-1][0]
        self._marks.append((name, self._time.mark()))
        return before

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def sampled(self, tokens: int) -> None:
        """So many, in this iteration, by this rank."""
        self._tokens += tokens

    def iterate(self) -> None:
        """An iteration ends here, and the next begins."""
        if not self.running:
            return
        phase, now = self._marks[-1][0], self._time.mark()
        self._waiting.append(_Iteration(self._marks, now, self._tokens))
        self._marks, self._tokens = [(phase, now)], 0
        self._read()

    def _read(self) -> None:
        """Those that have passed."""
        while self._waiting and self._time.passed(self._waiting[0].end):
            marks, end, tokens = self._waiting.popleft()
            ends = [mark for _, mark in marks[1:]] + [end]
            for (name, begun), ended in zip(marks, ends, strict=True):
                self._sums[name] += self._time.seconds(begun, ended)
            self._sampled += tokens
            self._count += 1

    def line(self) -> dict[str, float]:
        """For the log: means over the iterations since the last line, and the most memory so far. Empty where none has ended."""
        self._read()
        if not self._count:
            return {}
        seconds = {name: total / self._count for name, total in self._sums.items()}
        line = {f"time/{name}": value for name, value in seconds.items()} | {"time/iteration": sum(seconds.values())}
        if self._sampled and self._sums["sampling"] > 0:
            line["time/sampled_tokens_per_second"] = self._sampled / self._sums["sampling"]
        if (peak := peak_memory(self.device)) is not None:
            line["memory/peak_mib"] = peak / (1 << 20)
        self._forget()
        return line


def peak_memory(device: torch.device | None = None) -> int | None:
    """Bytes at the most so far: allocated on a CUDA device, else resident on the host; None where the system does not say (Windows)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1 << 10)
