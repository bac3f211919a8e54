"""Rewards on held-out prompts beside those in training: one that is hacked by way of the training prompts shows here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from l3ms.constraints.constraint import Constraint


def violation(constraint: Constraint, reward: float) -> float:
    """By how much the nearer bound is exceeded, native units; negative inside."""
    low = -math.inf if constraint.low is None else constraint.low - reward
    high = -math.inf if constraint.high is None else reward - constraint.high
    return max(low, high)


def gap(constraint: Constraint, held_out: Sequence[float], batches: Sequence[Sequence[float]]) -> float | None:
    """How much more the held-out rewards violate the constraint than those of the last training `batches`, in standard errors.

    The error of the training mean is that of its values or that between the batches, whichever is larger: the second knows of the
    weights' movement. None where there are too few values, or none that differ.
    """
    batches = [batch for batch in batches if batch]
    seen = [value for batch in batches for value in batch]
    if len(held_out) < 2 or len(seen) < 2:
        return None
    between = [statistics.fmean(batch) for batch in batches]
    own = statistics.variance(seen) / len(seen)
    moved = statistics.variance(between) / len(between) if len(between) > 1 else 0.0
    error = math.sqrt(statistics.variance(held_out) / len(held_out) + max(own, moved))
    if error == 0:
        return None
    worse = violation(constraint, statistics.fmean(held_out)) - violation(constraint, statistics.fmean(seen))
    return worse / error
