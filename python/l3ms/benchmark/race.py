"""Time: contestants take turns on the same tensors in one process, so that whatever else the machine does hits all alike.

A round draws new inputs, and every contestant runs once on them; the next round starts with the next one. Before the first round each runs
once unmeasured (whatever it compiles is then compiled) and its gradients are compared with float64.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from l3ms.benchmark import device
from l3ms.benchmark.contestant import Contestant, Run, Unavailable, prepare, reason
from l3ms.benchmark.inputs import Batch, Source, exact_dtype, expected, relative_error
from l3ms.benchmark.shapes import Case

# Largest |gradient - exact| / |exact|. Logits of size 20 that are rounded to bf16 cost a few percent; a wrong formula costs more.
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2}
BUDGET = 15.0  # seconds for all rounds of a contestant; a slower one takes part in fewer, in two at least
COMPILE = 25.0  # seconds that a contestant which compiles itself must have left; once begun, nothing stops it

Argument = TypeVar("Argument")


def turns(names: list[str], rounds: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    """(round, name), round by round; each round starts one place further, and leaves out who has had all of theirs."""
    for index in range(max(rounds.values(), default=0)):
        start = index % max(len(names), 1)
        for name in names[start:] + names[:start]:
            if index < rounds[name]:
                yield index, name


def clock(run: Callable[[Argument], object], argument: Argument) -> float:
    """Seconds of one call; what it returns is freed after the clock has stopped."""
    gc.collect()
    start = time.perf_counter()
    result = run(argument)
    seconds = time.perf_counter() - start
    del result
    return seconds


@dataclass
class Entry:
    """One contestant in one case."""

    contestant: Contestant
    run: Run | None = None
    reason: str | None = None  # why it does not run
    error: float | None = None  # of its gradients, relative to float64
    first: float = 0.0  # seconds of the last unmeasured call
    memory: int | None = None  # bytes at the peak, on a CUDA device
    seconds: list[float] = field(default_factory=list)

    def stop(self, why: str) -> None:
        self.run, self.reason, self.seconds = None, why, []


class Race:
    """All contestants in one case."""

    def __init__(self, case: Case, contestants: Iterable[Contestant], seed: int = 0, deadline: float = math.inf):
        """deadline: of `time.monotonic`; who has not run by then is left out, and rounds that have not begun are too."""
        self.deadline = deadline
        torch.compiler.reset()  # compiled functions of other cases have used up their recompilations
        self.case = case
        self.source = Source(case, seed)
        self.entries = {contestant.name: Entry(contestant) for contestant in contestants}
        for entry in self.entries.values():
            try:
                entry.run = prepare(entry.contestant, case)
            except Unavailable as why:
                entry.reason = str(why)

    @property
    def running(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.run]

    def check(self, said: Callable[[str], None] = lambda name: None, exact: bool = True) -> None:
        """Run everyone once, and (exact) compare with float64; who is wrong, or fails, is out, and the reason is kept."""
        batch, now = self.source.draw(0), time.monotonic()
        checked_by = now + 0.8 * (self.deadline - now)  # the rest is for the rounds
        for uniform in (False, True):
            names = [name for name in self.running if self.entries[name].contestant.uniform == uniform]
            checked = [name for name in names if exact and self.entries[name].contestant.kind != "limit"]
            if checked:
                said("float64")
            wanted = self._expected(batch, uniform) if checked else ()
            # who compiles itself comes last, when the others are done
            for name in sorted(names, key=lambda name: self.entries[name].contestant.compiled):
                entry = self.entries[name]
                left = checked_by - time.monotonic()
                if left < (COMPILE if entry.contestant.compiled else 0):
                    entry.stop("left out: the time that was set for this case was up")
                    continue
                said(name)
                self._check(self.entries[name], batch, wanted if name in checked else None)

    def _expected(self, batch: Batch, uniform: bool) -> tuple[Tensor, ...]:
        """float64 rounded to float32, which is far below the tolerance and half the memory."""
        exact = expected(self.case, batch.uniform() if uniform else batch, exact_dtype(self.case))
        return tuple(tensor.float() for tensor in exact)

    def _check(self, entry: Entry, batch: Batch, wanted: tuple[Tensor, ...] | None) -> None:
        assert entry.run
        try:
            if self.case.device == "cuda":
                device.poison()
            start = time.perf_counter()
            found = entry.run(batch)
            entry.first = time.perf_counter() - start
            if wanted is not None:
                entry.error = max(relative_error(mine, right) for mine, right in zip(found, wanted, strict=True))
            del found
            if self.case.device == "cuda":
                entry.memory = device.peak(entry.run, batch) if entry.contestant.kind != "limit" else None
            if entry.contestant.compiled or self.case.device == "cuda":
                entry.first = self._clock(entry.run, batch)
        except Exception as error:  # out of memory, or a peer that does not work here
            entry.stop(reason(error))
            return
        limit = TOLERANCE[self.case.dtype]
        if entry.error is not None and not entry.error <= limit:
            entry.stop(f"wrong: error {entry.error:.1e} against float64, allowed {limit:.0e}")

    def _clock(self, run: Run, batch: Batch) -> float:
        return (device.clock if self.case.device == "cuda" else clock)(run, batch)

    def rounds_of(self, name: str, rounds: int) -> int:
        first = self.entries[name].first
        return rounds if first * rounds <= BUDGET else min(rounds, max(2, int(BUDGET / first)))

    def time(self, rounds: int, said: Callable[[str], None] = lambda name: None) -> None:
        """Interleaved rounds over all that run."""
        drawn, batch = -1, None
        planned = {name: self.rounds_of(name, rounds) for name in self.running}
        for index, name in turns(self.running, planned):
            if time.monotonic() > self.deadline and self.entries[name].seconds:
                break
            if index != drawn:
                drawn, batch = index, self.source.draw(index + 1)
            assert batch is not None
            said(name)
            self.clock(name, batch)

    def clock(self, name: str, batch: Batch) -> None:
        entry = self.entries[name]
        if entry.run:
            try:
                entry.seconds.append(self._clock(entry.run, batch))
            except Exception as error:
                entry.stop(reason(error))
