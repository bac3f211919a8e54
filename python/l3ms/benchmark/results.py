"""What a benchmark writes: every round of every contestant, the machine and the versions, as one JSON file."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from l3ms.benchmark.environment import Environment
from l3ms.benchmark.iteration_results import IterationResult
from l3ms.benchmark.race import Race
from l3ms.benchmark.records import of_json
from l3ms.benchmark.shapes import Case, Shape
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.whole_files import write_json


@dataclass(kw_only=True)
class Measurement:
    """A contestant in a case."""

    contestant: str
    title: str
    kind: Literal["ours", "peer", "limit"]
    uniform: bool = False  # one weight for all sequences
    reason: str | None = None  # why it did not run
    seconds: list[float] = field(default_factory=list)  # of each round
    error: float | None = None  # |gradient - exact| / |exact|, the larger of hidden's and weight's
    memory: int | None = None  # bytes at the peak beyond inputs and what is returned
    memory_reason: str | None = None  # why it was not measured

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(kw_only=True)
class CaseResult:
    op: str
    rows: int
    hidden: int
    vocabulary: int
    sequences: int
    dtype: str
    masked: float  # share of the rows that is not scored
    device: str = "cpu"
    scored: int
    nll: float | None  # mean of the targets, nats
    flops: float  # that the op needs, on the scored rows
    ours: str | None  # the contestant that ratios refer to
    forms: dict[str, float] = field(default_factory=dict)  # seconds of the bare products, each alone: NT, NN, TN
    measurements: list[Measurement]

    @property
    def case(self) -> Case:
        return Case(self.op, Shape(self.rows, self.hidden, self.vocabulary), self.dtype, self.masked, self.device)

    def find(self, contestant: str | None) -> Measurement | None:
        return next((item for item in self.measurements if item.contestant == contestant), None)

    def ratio(self, item: Measurement) -> float | None:
        """Median time of a contestant over ours: above 1, ours is faster."""
        ours = self.find(self.ours)
        mine, theirs = ours.median if ours else None, item.median
        return theirs / mine if mine and theirs else None

    def gflops(self, item: Measurement) -> float | None:
        """GFLOP/s of what the op needs; what a contestant computes beyond that makes it slower and not better."""
        return self.flops / item.median / 1e9 if item.median else None

    def share(self, item: Measurement) -> float | None:
        """Of the rate of the bare products: 1 is as fast as these one after the other."""
        return sum(self.forms.values()) / item.median if self.forms and item.median else None


@dataclass(kw_only=True)
class ScalingPoint:
    size: int  # rows, or constraints
    contestant: str
    title: str
    seconds: list[float]
    reason: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(kw_only=True)
class Scaling:
    """Time over the number of rows, or over the number of constraints of a constraint step."""

    over: Literal["rows", "constraints"]
    hidden: int
    vocabulary: int
    dtype: str
    rows: int | None = None  # where they are not what varies
    points: list[ScalingPoint]


@dataclass(kw_only=True)
class Part:
    """A part of the work, timed by itself: one product, the row kernel, the head within one workspace."""

    group: str  # what it is a part of, a table each
    title: str
    seconds: list[float] = field(default_factory=list)
    flops: float | None = None
    bytes: float | None = None  # that it moves
    memory: int | None = None  # at its peak, as of a measurement
    reason: str | None = None  # why it did not run

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(kw_only=True)
class Results:
    version: Literal[1] = 1
    environment: Environment
    threads: int
    rounds: int
    seed: int
    budget: float | None = None  # seconds that the run was to take at most
    cases: list[CaseResult] = field(default_factory=list)
    scaling: list[Scaling] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    iterations: list[IterationResult] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its files: whole iterations are apart from the head's ops, since they are measured in another environment."""
        return f"{self.environment.device}{'-iteration' if self.iterations and not self.cases else ''}"

    def add(self, case: CaseResult) -> None:
        """Enter a case, in place of an earlier measurement of the same one."""
        self.cases = [old for old in self.cases if old.case != case.case] + [case]

    def add_iteration(self, found: IterationResult) -> None:
        self.iterations = [old for old in self.iterations if old.key != found.key] + [found]


def gather(race: Race, ours: str | None) -> CaseResult:
    """What a race has found; memory is entered later."""
    case, nll = race.case, race.source.nll
    measurements = [
        Measurement(
            contestant=name,
            title=entry.contestant.title,
            kind=entry.contestant.kind,  # pyright: ignore[reportArgumentType]
            uniform=entry.contestant.uniform,
            reason=entry.reason,
            seconds=entry.seconds,
            error=entry.error,
            memory=entry.memory,
        )
        for name, entry in race.entries.items()
    ]
    return CaseResult(
        op=case.op,
        rows=case.shape.rows,
        hidden=case.shape.hidden,
        vocabulary=case.shape.vocabulary,
        sequences=case.shape.sequences,
        dtype=case.dtype,
        masked=case.masked,
        device=case.device,
        scored=case.scored,
        nll=statistics.mean(nll) if nll else None,
        flops=case.flops,
        ours=ours,
        measurements=measurements,
    )


def write(results: Results, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(results))
    return path


def read(path: Path) -> Results:
    """A results file.

    Raises:
        ConfigError: it is missing, or not one.
    """
    try:
        return of_json(Results, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except ValueError as error:  # `NotARecord`, or of JSON itself
        raise ConfigError(str(path), f"is not a results file: {error}") from None
