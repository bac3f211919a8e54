"""What a figure of trust is counted from: seeded cases in parts, each a process of its own that can be ended and goes on where it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

KEPT = 20  # failures that are kept word for word; all are counted


class Skipped(Exception):
    """A part that cannot be run here; its text is the reason."""


@dataclass
class Found:
    """What came of some cases."""

    cases: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)  # a line each, that names the seed
    worst: float | None = None  # share of what is allowed: above 1 is a failure
    worst_case: str = ""  # its seed, and what it is
    sums: dict[str, float] = field(default_factory=dict)  # added up over pieces, for `Part.close`
    figures: dict[str, Any] = field(default_factory=dict)  # what else is to be told; of two numbers the larger stays
    skipped: str | None = None

    def fail(self, text: str) -> None:
        self.failed += 1
        if len(self.failures) < KEPT:
            self.failures.append(" ".join(text.split())[:300])

    def measure(self, share: float, case: object) -> None:
        """share: of what is allowed. A NaN counts as the worst there is."""
        if self.worst is None or not share <= self.worst:
            self.worst, self.worst_case = share, str(case)

    def add(self, other: Found) -> None:
        self.cases += other.cases
        self.failed += other.failed
        self.failures = (self.failures + other.failures)[:KEPT]
        if other.worst is not None:
            self.measure(other.worst, other.worst_case)
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, value in other.figures.items():
            here = self.figures.get(name)
            both = isinstance(here, int | float) and isinstance(value, int | float)
            self.figures[name] = max(here, value) if both else value
        self.skipped = self.skipped or other.skipped

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Found:
        return Found(**{each.name: values[each.name] for each in fields(Found) if each.name in values})


@dataclass(frozen=True)
class Part:
    """Some cases of one kind: `run` takes a range of seeds, one a case, and finds the same each time."""

    name: str
    run: Callable[[range], Found]
    cases: int
    slice: int = 0  # cases of `make test`
    piece: int = 1000  # cases after which what was found is written down
    environment: Mapping[str, str] = field(default_factory=dict)  # of its process
    seconds: float = 60  # that it takes on one core, about: the longest begin first
    limit: float = 2400  # seconds after which its process is ended
    close: Callable[[Found], None] | None = None  # once all cases are there: from sums to figures and failures
    asked: bool = False  # counted only where --parts names it; what was found stays until it is counted again

    def __post_init__(self) -> None:
        if "," in self.name:
            raise ValueError(f"a part's name must have no comma, which is between names in --parts, got {self.name!r}")

    def pieces(self, cases: int, seed: int) -> list[range]:
        first = seed * 10_000_000
        cuts = itertools.pairwise([*range(0, cases, self.piece), cases])
        return [range(first + start, first + end) for start, end in cuts]


@dataclass(frozen=True)
class Goal:
    """One row of RELIABILITY.md."""

    key: str  # G1
    claim: str  # what holds if no case fails
    allowed: str  # what a worst case of 1 is
    module: str  # of this folder, whose `parts()` are the goal's
    beyond: str = "none found"  # what is published elsewhere


def each(check: Callable[[int], float | None], seeds: Iterable[int]) -> Found:
    """`check` on every seed: the share of what is allowed, or None where there is no measure. What it raises is a failure."""
    found = Found()
    for seed in seeds:
        found.cases += 1
        try:
            share = check(seed)
        except Skipped:
            raise
        except Exception as error:
            found.fail(f"seed {seed}: {type(error).__name__}: {error}")
            continue
        if share is not None:
            found.measure(float(share), f"seed {seed}")
            if not share <= 1:
                found.fail(f"seed {seed}: {share:.4g} of what is allowed")
    return found
