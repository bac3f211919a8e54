"""What a bound on the mean length leaves open: single answers. A mean of 14 tokens may be 2 tokens in most and the limit in the rest.

Short answers are those below a fifth of the lower bound (of the upper one where there is no other), long ones those that are cut. The
advice is a bound on the share of either, as YAML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from l3ms.constraints.constraint import Constraint, Length
from l3ms.constraints.rewards import ends_with_eos

SHORT = 0.2  # of the bound
LARGE = 0.05  # a share of single answers that is worth a word


def is_mean_length(constraint: Constraint) -> bool:
    """Whether it bounds the mean length; a monitor bounds nothing."""
    return isinstance(constraint, Length) and constraint.event is None and not constraint.monitor


def short_below(constraint: Constraint, share: float = SHORT) -> float:
    """Tokens below which an answer is short, of a constraint on the mean length."""
    bound = constraint.max if constraint.min is None else constraint.min
    assert bound is not None
    return share * bound


class SingleAnswers(NamedTuple):
    """Shares of responses that a bound on the mean length says nothing about."""

    below: float  # tokens
    short: float  # share of responses below that
    cut: float  # share of responses that did not end

    @staticmethod
    def of(constraint: Constraint, lengths: Sequence[float], ended: float) -> SingleAnswers:
        """Of n >= 1 responses; `ended`: the share of them that did."""
        below = short_below(constraint)
        return SingleAnswers(below, sum(length < below for length in lengths) / len(lengths), 1 - ended)

    def text(self, limit: int | None = None) -> str:
        """`35% are below 2.4 tokens, a fifth of the bound, and 6.2% are cut at 64`, where the limit is known."""
        short, cut = (f"{100 * share:.3g}%" for share in (self.short, self.cut))
        return f"{short} are below {self.below:g} tokens, a fifth of the bound, and {cut} are cut" + (
            "" if limit is None else f" at {limit}"
        )


def open_sides(constraint: Constraint, constraints: Sequence[Constraint]) -> tuple[bool, bool]:
    """Whether (short answers, cut answers) have no bound of their own, on a share or a quantile, beside that on the mean. Without a lower
    bound on the mean nobody asked for long answers, and with one of at most 5 tokens none is short."""
    shares = [(item, item.event) for item in constraints if isinstance(item, Length)]
    least = any(event is not None and not event.at_most and item.low is not None for item, event in shares)
    most = any(event is not None and (event.at_most or item.high is not None) for item, event in shares)
    ends = any(item.function is ends_with_eos and item.low is not None for item in constraints)
    return constraint.min is not None and short_below(constraint) > 1 and not least, not (most or ends)


def bounds_to_add(constraint: Constraint, *, short: bool, cut: bool) -> str:
    """YAML of constraints on 95% of the single answers."""
    lines = []
    if short:
        lines.append(f"{{type: length, name: not-short, quantile: 0.05, min: {math.ceil(short_below(constraint))}}}")
    if cut:
        lines.append("{type: reward, name: ended, reward: ends_with_eos, min: 0.95}")
    return ", ".join(lines)
