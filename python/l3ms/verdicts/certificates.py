"""Verdicts on constraints from fresh, independent samples: one-sided confidence bounds on a mean, and what follows from them.

A bound of a constraint is SATISFIED when the confidence bound of the mean lies on its right side, VIOLATED when the opposite confidence
bound lies beyond it, INCONCLUSIVE otherwise. Native units, no margin. Of a true bound only VIOLATED is wrong and of a broken one only
SATISFIED, so with K one-sided bounds at level 1 - delta / K each (Bonferroni) no verdict at all is wrong with probability >= 1 - delta.

How the confidence bound is made is declared before there are samples (`declare`):

* `exact`: values that can only be 0 or 1. Clopper and Pearson, Biometrika 26 (1934): quantiles of the beta distribution. Holds for every n.
* `bernstein`: values of a known range. Empirical Bernstein, Maurer and Pontil, COLT 2009, theorem 4 (arXiv 0907.3740):
  `mean +- (sqrt(2 V ln(2 / delta) / n) + 7 (high - low) ln(2 / delta) / (3 (n - 1)))`, V the sample variance. For every n.
* `t`: Student's, `mean +- t_{n - 1, 1 - delta} sqrt(V / n)`. Holds as n grows. Of lengths drawn from a geometric distribution (mean 19,
  cut at 60) the upper bound at 5% misses 6.3% of the time with n = 100, 5.5% with 400, 5.2% with 1600 (20,000 repetitions).

Samples that share a prompt are not independent: give `groups`, and the groups are what is counted.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from l3ms.constraints.constraint import Constraint
from l3ms.verdicts.declaring import Declared, Range, range_term
from l3ms.verdicts.quantiles import beta_quantile, student_t_quantile

Word = Literal["SATISFIED", "VIOLATED", "INCONCLUSIVE"]

MOST_SAMPLES = 10**8  # beyond it, more samples are no advice
FEW = 30  # samples below which Student's t is said to be doubtful


@dataclass(frozen=True)
class BoundVerdict:
    """One side of a constraint."""

    side: Literal["min", "max"]
    limit: float  # native units
    verdict: Word
    more: (
        int | None
    )  # about so many more independent samples would settle it, at this mean and variance; None: settled, or no number would


@dataclass(frozen=True)
class Verdict:
    """Of one constraint."""

    name: str
    verdict: Word | None  # of a monitor: None
    bounds: list[BoundVerdict]
    method: str
    why: str  # of the method
    range: Range | None
    samples: int  # finite values
    groups: int  # independent ones among them: groups of samples that share a prompt
    missing: int  # None: excluded by the reward
    nonfinite: int  # NaN and inf
    mean: float  # native units; NaN without samples
    deviation: float  # standard, of a value of a group
    lower: float  # one-sided confidence bounds, each at 1 - delta
    upper: float
    delta: float  # of one bound
    notes: list[str]


def confidence_bounds(
    values: Sequence[float],
    delta: float,
    declared: Declared,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """One-sided (lower, upper) confidence bounds of the mean, each at level 1 - delta.

    Args:
        values: n finite ones.
        groups: n keys; values of one key need not be independent of each other.

    Raises:
        ValueError: delta outside (0, 1), a value outside the declared range, or other than 0 and 1 for the exact method.
    """
    units = _Units.of(values, declared, groups)
    return _interval(units, units.n, delta, declared)


def judge(
    constraint: Constraint,
    values: Sequence[float | None],
    delta: float,
    declared: Declared,
    groups: Sequence[Hashable] | None = None,
) -> Verdict:
    """The verdict on one constraint.

    Args:
        values: of the samples, 0 or 1 where a share is bounded (`Constraint.indicator`, `Rollout.rewards`): None is left out and
            counted; NaN and inf are left out, counted, and rule SATISFIED out.
        delta: allowed error of one one-sided bound: that of the whole certificate divided by the number of one-sided bounds.
        groups: keys of the samples, those of one prompt being alike.

    Raises:
        ValueError: as `confidence_bounds`; of a share other values than 0 and 1.
    """
    keys = list(range(len(values))) if groups is None else list(groups)
    given = [(float(v), key) for v, key in zip(values, keys, strict=True) if v is not None]
    finite = [(value, key) for value, key in given if math.isfinite(value)]
    nonfinite, missing = len(given) - len(finite), len(values) - len(given)
    raw = [value for value, _ in finite if value not in (0.0, 1.0)] if constraint.event is not None else []
    if raw:
        raise ValueError(
            f"constraint {constraint.name!r} bounds a share, of values 0 and 1, got {raw[0]:g}: "
            "give constraint.indicator(values) or rollout.rewards(...)"
        )
    try:
        units = _Units.of([value for value, _ in finite], declared, [key for _, key in finite])
    except ValueError as error:
        raise ValueError(f"constraint {constraint.name!r}: {error}") from None
    lower, upper = _interval(units, units.n, delta, declared)
    sides = []
    for side, limit in (("min", constraint.low), ("max", constraint.high)):
        if limit is None:
            continue
        word = _word(side, limit, lower, upper)
        more = _more(units, limit, delta, declared) if word == "INCONCLUSIVE" else None
        sides.append(BoundVerdict(side, float(limit), word, more))  # type: ignore[arg-type]
    notes = _notes(units, declared, missing, nonfinite, constraint.monitor)
    if nonfinite:
        sides = [replace(b, verdict="INCONCLUSIVE") if b.verdict == "SATISFIED" else b for b in sides]
    word = None if constraint.monitor else together([side.verdict for side in sides])
    return Verdict(
        constraint.name, word, sides, declared.method, declared.why, declared.range,
        len(finite), units.n, missing, nonfinite, units.mean, math.sqrt(units.variance) if units.n > 1 else math.nan,
        lower, upper, delta, notes,
    )  # fmt: skip


def together(words: Sequence[str]) -> Word:
    """VIOLATED where any is, SATISFIED where all are; nothing at all is INCONCLUSIVE."""
    if "VIOLATED" in words:
        return "VIOLATED"
    return "SATISFIED" if words and set(words) == {"SATISFIED"} else "INCONCLUSIVE"


@dataclass(frozen=True)
class _Units:
    """Independent values whose mean is that of the samples: the samples, or one value per group."""

    n: int
    mean: float
    variance: float  # sample variance, n - 1
    span: float  # high - low of one of them, inf where no range is known
    equal: bool  # all samples are the same number

    @staticmethod
    def of(values: Sequence[float], declared: Declared, groups: Sequence[Hashable] | None) -> "_Units":
        x = np.asarray(values, dtype=np.float64)
        if not len(x):
            return _Units(0, math.nan, math.nan, math.inf, False)
        low, high = declared.range or (-math.inf, math.inf)
        outside = (x < low) | (x > high)
        if outside.any():
            raise ValueError(f"the value {x[outside][0]:g} is outside of the declared range [{low:g}, {high:g}]")
        mean, equal = float(x.mean()), bool((x == x[0]).all())
        keys: dict[Hashable, int] = {}
        index = np.array([keys.setdefault(key, len(keys)) for key in (range(len(x)) if groups is None else groups)])
        n, span = len(keys), high - low
        if declared.method == "exact":
            if not np.isin(x, (0.0, 1.0)).all():
                raise ValueError("the exact method wants values of 0 and 1 alone")
            if n < len(x):
                raise ValueError("the exact method wants independent samples")
        if n < len(x):
            # (n / N) sum_{i in group} (x_i - centre): independent, and their mean is that of x_i - centre. Around a constant for
            # Bernstein, whose theorem wants independent values; around the mean for t, the usual cluster-robust variance.
            centre = (low + high) / 2 if declared.method == "bernstein" else mean
            share = n / len(x)
            span *= share * float(np.bincount(index).max())
            x = centre + share * np.bincount(index, weights=x - centre)
        variance = 0.0 if equal else float(x.var(ddof=1)) if n > 1 else math.nan
        return _Units(n, mean, variance, span, equal)


def _interval(units: _Units, n: int, delta: float, declared: Declared) -> tuple[float, float]:
    """(lower, upper) if there were `n` units of this mean and variance."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}")
    low, high = declared.range or (-math.inf, math.inf)
    if units.n == 0:
        return low, high
    mean = units.mean
    if declared.method == "exact":
        hits = mean * n
        lower = 0.0 if hits <= 0 else beta_quantile(delta, hits, n - hits + 1)
        return lower, (1.0 if hits >= n else beta_quantile(1 - delta, hits + 1, n - hits))
    if declared.method == "t" and units.equal:
        # No variance to go by. Others than the value seen have a probability of at most 1 - delta^(1/n), or one would have been seen.
        unseen = -math.expm1(math.log(delta) / n)
        return mean - (mean - low) * unseen, mean + (high - mean) * unseen
    if n < 2:
        return low, high
    if declared.method == "bernstein":
        half = math.sqrt(2 * units.variance * math.log(2 / delta) / n) + range_term(units.span, n, delta)
    else:
        half = student_t_quantile(1 - delta, n - 1) * math.sqrt(units.variance / n)
    return max(low, mean - half), min(high, mean + half)


def _word(side: str, limit: float, lower: float, upper: float) -> Word:
    satisfied, violated = (lower >= limit, upper < limit) if side == "min" else (upper <= limit, lower > limit)
    return "SATISFIED" if satisfied else "VIOLATED" if violated else "INCONCLUSIVE"


def _more(units: _Units, limit: float, delta: float, declared: Declared) -> int | None:
    """Further units after which the limit would be outside of the interval, at the mean and variance seen."""

    def settled(n: int) -> bool:
        lower, upper = _interval(units, n, delta, declared)
        return lower > limit or upper < limit

    if units.n < 2 or units.mean == limit:
        return None
    enough = units.n
    while not settled(enough):
        enough *= 2
        if enough > MOST_SAMPLES:
            return None
    short = enough // 2
    while enough - short > max(1, short // 100):
        middle = (short + enough) // 2
        short, enough = (short, middle) if settled(middle) else (middle, enough)
    return max(1, enough - units.n)


def _notes(units: _Units, declared: Declared, missing: int, nonfinite: int, monitor: bool) -> list[str]:
    notes = []
    if nonfinite:
        so = "" if monitor else ": it cannot be satisfied"
        notes.append(f"{nonfinite} values are NaN or infinite and left out{so}")
    if missing:
        notes.append(f"{missing} samples have no value (None): the mean is that of the others")
    if units.n == 0:
        notes.append("no value to judge by")
    elif declared.method == "t" and units.equal:
        unknown = "; declare its range with --range NAME=LOW,HIGH" if declared.range is None else ""
        notes.append(
            f"all {units.n} values are {units.mean:g}: bounded by the probability of one that was not seen{unknown}"
        )
    elif declared.method == "t" and units.n < FEW:
        notes.append(f"Student's t is an approximation, and doubtful with {units.n} independent samples")
    return notes
