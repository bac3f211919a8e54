"""How the confidence bounds of a constraint will be made, declared from what is known of its values before there are any."""

import math
from dataclasses import dataclass
from typing import Literal

from l3ms.constraints.constraint import Constraint, Length

Range = tuple[float, float]

# `auto` takes Bernstein where the part of its width that no variance can shrink is at most this share of the constraint's room
ROOM_SHARE = 0.1


@dataclass(frozen=True)
class Declared:
    """How the confidence bounds of one constraint will be made, fixed before sampling."""

    method: Literal["exact", "bernstein", "t"]
    range: Range | None  # of a single value, where it is known
    why: str


def known_range(
    constraint: Constraint, max_new_tokens: int, declared: Range | None = None
) -> tuple[Range | None, bool]:
    """(range of a single value, whether it can only be 0 or 1), known without a sample.

    A chance constraint and a bound on a quantile are of an indicator; a length is in [1, max_new_tokens]; a reward says so by attributes of
    the constraint or of its function, `reward_range = (low, high)` and `binary = True`; or the user does (`declared`).

    Raises:
        ValueError: `declared` where the values are 0 and 1 anyway, or have no range of their own.
    """
    indicator = constraint.event is not None or any(
        getattr(owner, "binary", False) for owner in (constraint, constraint.function)
    )
    if declared is not None and indicator:
        raise ValueError(f"the values of {constraint.name!r} are 0 and 1, which is known; leave it out")
    if declared is not None and getattr(constraint, "per_token", False):
        raise ValueError(
            f"{constraint.name!r} is a ratio of means (per_token), whose values have no range; leave it out"
        )
    if indicator:
        return (0.0, 1.0), True
    if declared is not None:
        return declared, False
    if isinstance(constraint, Length):
        return (1.0, float(max_new_tokens)), False
    for owner in (constraint, constraint.function):
        found = getattr(owner, "reward_range", None)
        if found is not None:
            return (float(found[0]), float(found[1])), False
    return None, False


def declare(
    constraint: Constraint,
    n: int,
    delta: float,
    *,
    known: Range | None,
    indicator: bool = False,
    grouped: bool = False,
    method: str = "auto",
) -> Declared:
    """The method for `n` independent samples at level 1 - delta, from what is known before sampling.

    Args:
        known, indicator: as from `known_range`; of a share (threshold, quantile) they are known.
        grouped: samples will share prompts: the exact bound of an indicator then does not hold.
        method: "auto": exact for indicators; Bernstein where the range is known and 7 (high - low) ln(2 / delta) / (3 (n - 1)) is at most
            a tenth of the constraint's room (half of max - min; the scale where there is one bound); Student's t otherwise. "bernstein"
            and "t" insist.

    Raises:
        ValueError: an unknown method, Bernstein without a range, or another range of a share than (0, 1).
    """
    if constraint.event is not None:
        if known not in (None, (0.0, 1.0)):
            raise ValueError(f"{constraint.name!r} bounds a share, whose values are 0 and 1: leave out known={known}")
        known, indicator = (0.0, 1.0), True
    if method not in ("auto", "bernstein", "t"):
        raise ValueError(f"method must be auto, bernstein or t, got {method!r}")
    if method == "bernstein" and known is None:
        raise ValueError(
            f"method: bernstein needs the range of {constraint.name!r}, which is not known; "
            f"declare it with --range {constraint.name}=LOW,HIGH"
        )
    if method == "t":
        return Declared("t", known, "asked for")
    if method == "auto" and indicator and not grouped:
        return Declared("exact", known, "values are 0 or 1")
    if method == "bernstein":
        return Declared("bernstein", known, "asked for")
    if known is None:
        return Declared("t", None, "no range is known")
    room = constraint.width / 2 if math.isfinite(constraint.width) and constraint.width > 0 else constraint.unit
    fixed = range_term(known[1] - known[0], n, delta)
    text = f"values in [{known[0]:g}, {known[1]:g}]"
    if fixed <= ROOM_SHARE * room:
        return Declared("bernstein", known, text)
    return Declared(
        "t",
        known,
        f"{text} are too wide a range for {n} samples: it alone would make Bernstein's bound {fixed:.2g} wide",
    )


def range_term(span: float, n: int, delta: float) -> float:
    return 7 * span * math.log(2 / delta) / (3 * (n - 1)) if n > 1 else math.inf
