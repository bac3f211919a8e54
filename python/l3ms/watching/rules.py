"""When the responses of a run have gone wrong: each rule compares the mean of a statistic over the last iterations with a limit.

A rule is armed once it has been within its limit: a base that truncates everything, or a task whose answers are one word, trips nothing
until it has been otherwise. The mean over a window is what keeps one noisy batch from tripping.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from l3ms.config.watch import WatchConfig


class Trip(NamedTuple):
    rule: str
    value: float
    limit: float


@dataclass(frozen=True)
class Rule:
    """Trips where the mean of `statistic` is above `limit`; or at most `limit`; or, with `of_start`, below `limit` times its start."""

    name: str
    statistic: str
    limit: float
    above: bool = False
    of_start: bool = False

    def beyond(self, value: float, start: float) -> float | None:
        """The limit where the value is beyond it."""
        if self.of_start:
            return self.limit * start if value < self.limit * start else None
        return self.limit if (value > self.limit if self.above else value <= self.limit) else None


def rules_of(config: WatchConfig) -> list[Rule]:
    """The rules that are on; a fall by x trips at 1 - x of the start."""

    def kept(fall: float | None) -> float | None:
        return None if fall is None else 1 - fall

    given = [
        (kept(config.ended_fall), ("EOS rate fell", "ended"), {"of_start": True}),
        (config.ended_min, ("EOS rate", "ended"), {}),
        (config.truncated_max, ("truncated share", "truncated"), {"above": True}),
        (config.median_length_min, ("median length", "length/p50"), {}),
        (config.length_spread_min, ("spread of lengths", "length/spread"), {}),
        (config.short_max, ("share of short responses", "length/short"), {"above": True}),
        (config.humps_max, ("two humps of lengths", "length/humps"), {"above": True}),
        (kept(config.distinct_2_fall), ("distinct-2 fell", "distinct_2"), {"of_start": True}),
    ]
    return [Rule(*names, limit=limit, **options) for limit, names, options in given if limit is not None]


class RuleWatch:
    """Follows the statistics of each iteration: `update` returns what is beyond its limit now."""

    def __init__(self, config: WatchConfig):
        self.rules = rules_of(config)
        self.window = config.window
        self.start: dict[str, float] = {}  # of each statistic
        self._armed: set[str] = set()
        self._recent: dict[str, deque[float]] = {}

    def update(self, values: Mapping[str, float]) -> list[Trip]:
        """`values` as from `response_statistics`, of one iteration."""
        for name, value in values.items():
            self._recent.setdefault(name, deque(maxlen=self.window)).append(value)
        trips = []
        means = {name: statistics.fmean(seen) for name, seen in self._recent.items() if len(seen) == self.window}
        for name, mean in means.items():
            self.start.setdefault(name, mean)
        for rule in self.rules:
            if rule.statistic not in means:
                continue
            mean = means[rule.statistic]
            limit = rule.beyond(mean, self.start[rule.statistic])
            if limit is None:
                self._armed.add(rule.name)
            elif rule.name in self._armed:
                trips.append(Trip(rule.name, mean, limit))
        return trips

    def forget(self) -> None:
        """The last iterations did not happen; the start is still the start."""
        self._recent.clear()

    def state(self) -> dict[str, Any]:
        recent = {name: list(seen) for name, seen in self._recent.items()}
        return {"start": dict(self.start), "armed": sorted(self._armed), "recent": recent}

    def restore(self, state: dict[str, Any]) -> None:
        self.start, self._armed = state["start"], set(state["armed"])
        self._recent = {name: deque(seen, maxlen=self.window) for name, seen in state["recent"].items()}


class HeldOutWatch:
    """Compares rewards on held-out prompts with those of the last training batches; a gap is in standard errors, positive where the
    held-out responses violate their bound by more."""

    twice = 2  # evaluations in a row: training batches are a few iterations old, and weights move

    def __init__(self, limit: float | None):
        self.limit = limit
        self._beyond: dict[str, int] = {}

    def update(self, gaps: Mapping[str, float]) -> list[Trip]:
        trips = []
        for name, gap in gaps.items():
            beyond = self.limit is not None and gap > self.limit
            self._beyond[name] = self._beyond.get(name, 0) + 1 if beyond else 0
            if self.limit is not None and self._beyond[name] >= self.twice:
                trips.append(Trip(f"held-out {name}", gap, self.limit))
        return trips

    @property
    def beyond(self) -> bool:
        """Whether the last look found a gap."""
        return any(self._beyond.values())

    def forget(self) -> None:
        self._beyond.clear()

    def state(self) -> dict[str, int]:
        return dict(self._beyond)

    def restore(self, state: dict[str, int]) -> None:
        self._beyond = dict(state)
