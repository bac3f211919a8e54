"""Bounds on a share of the responses: chance constraints (`threshold`), and bounds on a quantile, which are the same.

A q-quantile of a reward r is any x with P(r < x) <= q <= P(r <= x). Where several are (a distribution with steps), they fill an interval
from Q-(q) = inf {x: P(r <= x) >= q}, numpy's `inverted_cdf`, to Q+(q) = sup {x: P(r < x) <= q} = -Q-(1 - q) of -r. Both are attained, since
P(r <= x) is continuous from the right and P(r < x) from the left, and so, for whatever r, whole numbers or not,

    min: m   some q-quantile is at least m,  Q+(q) >= m  <=>  P(r < m) <= q   <=>  P(r >= m) >= 1 - q
    max: M   some q-quantile is at most M,   Q-(q) <= M  <=>  P(r <= M) >= q  <=>  P(r > M) <= 1 - q

A bound is met at its edge, as all bounds are: with exactly q of the responses below m, one of the quantiles is m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Bounds = tuple[float | None, float | None]
PER_TOKEN_SHARE = (
    "per_token is for a mean: of a batch's mean length, a share of responses would depend on how they are batched"
)


class Event(NamedTuple):
    """What counts as 1: a reward of at least `value`, or of at most that."""

    value: float
    at_most: bool = False

    def indicator(self, reward: float) -> float:
        return float(reward <= self.value if self.at_most else reward >= self.value)

    def text(self, name: str) -> str:
        return f"P({name} {'<=' if self.at_most else '>='} {self.value:g})"


def event_of(item: Mapping[str, Any]) -> Event | None:
    """Whose probability is bounded; None where it is the mean. `item` has `min`, `max`, `threshold`, `quantile`, as a constraint does."""
    if item.get("quantile") is not None:
        low = item.get("min")
        return Event(item["max"], at_most=True) if low is None else Event(low)
    return None if item.get("threshold") is None else Event(item["threshold"])


def bounds_of(item: Mapping[str, Any]) -> Bounds:
    """(low, high) of the mean of what is measured: `min` and `max`, or what they come to of a quantile, a least share."""
    quantile = item.get("quantile")
    if quantile is None:
        return item.get("min"), item.get("max")
    return (quantile if item.get("min") is None else 1 - quantile), None


def quantile_text(item: Mapping[str, Any]) -> str:
    """`5% quantile >= 4`; empty where no quantile is bounded."""
    if item.get("quantile") is None:
        return ""
    side = f"<= {item['max']:g}" if item.get("min") is None else f">= {item['min']:g}"
    return f"{100 * item['quantile']:g}% quantile {side}"


def wrong_quantile(item: Mapping[str, Any]) -> str | None:
    """What is wrong with a constraint that has a quantile, beginning with the field; None where nothing is."""
    quantile = item["quantile"]
    if not 0 < quantile < 1:
        return f"quantile must be between 0 and 1 (0.05 is the 5% quantile), got {quantile:g}"
    if item.get("monitor"):
        return "quantile is for a constraint; a monitor of a share has a threshold"
    if item.get("threshold") is not None:
        return "quantile and threshold are two ways to bound a share: give one of them"
    if item.get("min") is not None and item.get("max") is not None:
        return (
            "quantile takes min or max, not both: two bounds are two shares, and so two constraints, each with a name"
        )
    return None


def wrong_probability(item: Mapping[str, Any]) -> str | None:
    """What is wrong with the bounds and the margin on a share, beginning with the field; None where nothing is."""
    if item.get("threshold") is not None:
        for side in ("min", "max"):
            bound = item.get(side)
            if bound is not None and not 0 <= bound <= 1:
                instead = "a bound in the reward's own units takes a quantile instead of a threshold"
                return f"{side} must be in [0, 1], since with a threshold it is a probability, got {bound:g}; {instead}"
    margin = item.get("margin")
    if event_of(item) is None:
        return None
    low, high = bounds_of(item)
    if margin and ((low is not None and low + margin >= 1) or (high is not None and high - margin <= 0)):
        bound = f"at least {low:g}" if low is not None and low + margin >= 1 else f"at most {high:g}"
        return f"margin must leave room for a share, which is in [0, 1] and wanted {bound}, got {margin:g}"
    return None


def sample_quantile(values: Sequence[float], item: Mapping[str, Any]) -> float:
    """The quantile of n >= 1 values that the bound of `item` is about: at its bound's right side where, and only where, the share is."""
    level, _ = bounds_of(item)
    event = event_of(item)
    assert level is not None
    assert event is not None
    n = len(values)
    count = math.ceil(level * n)
    while count > 1 and (count - 1) / n >= level:  # level * n was rounded up
        count -= 1
    return sorted(values, reverse=not event.at_most)[count - 1]
