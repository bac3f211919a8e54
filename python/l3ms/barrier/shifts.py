"""The bias of a barrier whose mu stops at the noise floor, and the shift of its bounds that removes it.

With mu kept large an estimate rests where lambda = B'(C) balances the task: far inside a bound that costs the task little, beyond one that
costs it much, and both sides of a narrow range push at once. The classical remedy leaves mu alone and moves the bound: the shifted barrier
lambda = B'(C + shift), whose shift is the integral of C (Polyak, Modified barrier functions, Math. Programming 54, 1992; Conn, Gould and
Toint, Math. Comp. 66, 1997). It rests where C = 0 or lambda is small, for any mu. In terms of control mu sets the proportional gain, which
the noise of the estimates and the lag of their average bound from above, and the shift is the slow integral that takes the rest away.

Half-steps are clipped to the same norm, and of the constraints' gradient most is noise of its samples: the part of a clipped step that
points towards a far bound may be less than the task's pull, whatever lambda is. A shift that has grown large says so. From there on the
task's step shrinks instead (`task_share`), the only remedy within a clipped step.

Were every violation counted, a run that starts far outside (a base that never ends its responses) would arrive with a large shift and swing
for the rest of its time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

RATE = 0.05  # of the shift, per step and unit of C
MEMORY = 0.05  # weight of a new violation in the slow average that says whether it shrinks
REMEMBERED = 2.0  # the slow average is at most so many times the violation: a start at C = 35 would pass for shrinking for 70 steps
INSIDE = (
    1.5  # standard errors inside the margin that the integral aims at: estimates swing about where they rest by so much
)
INSIDE_SHARE = 0.2  # of a range, at most
LARGEST_ERROR = 0.25  # of C that counts: on the way to a far bound the shift must not grow without limit
LARGEST = 0.5
FUTILE = 0.15  # a shift beyond which more of lambda is taken to be lost in the clipping
SOFTNESS = 0.15  # of the shift beyond FUTILE that divides the task's step by e
LEAST_SHARE = 0.1


class Integral(NamedTuple):
    """Of each of K bounds, float64 on one device."""

    shift: Tensor  # (K,) dimensionless, inwards
    slow: Tensor  # (K,) slow average of the violations; NaN before the first

    @classmethod
    def start(cls, bounds: int, device: torch.device | str) -> Integral:
        zeros = torch.zeros(bounds, dtype=torch.float64, device=device)
        return cls(zeros, torch.full_like(zeros, math.nan))


def advance(integral: Integral, violation: Tensor, noise: Tensor, width: Tensor) -> Integral:
    """After a constraint step. All (K,) float64, dimensionless.

    A violation that shrinks by itself does not count: on its way to a bound an estimate needs no shift, and one that has grown on the way
    takes as long to go.

    Args:
        violation: C, unshifted, margin included; NaN: nothing observed.
        noise: standard errors of C.
        width: of the range that the bound is one end of, inf where it is the only one.
    """
    noise = noise.nan_to_num(0.0, posinf=0.0)
    error = violation + torch.minimum(INSIDE * noise, INSIDE_SHARE * width)
    shrinking = (violation > 0) & (violation < 0.999 * integral.slow - noise)  # by more than rounding
    error = torch.where(shrinking, 0.0, error).nan_to_num(0.0).clamp(-LARGEST_ERROR, LARGEST_ERROR)
    shift = (integral.shift + RATE * error).clamp(-LARGEST, LARGEST)
    remembered = torch.minimum(integral.slow, REMEMBERED * violation.clamp(min=0.0))
    averaged = torch.where(integral.slow.isnan(), violation, torch.lerp(remembered, violation, MEMORY))
    return Integral(shift, torch.where(violation.isnan(), integral.slow, averaged))


def shifted(table: Tensor, shift: Tensor) -> Tensor:
    """`Bounds.table` (K, 6) with its bounds moved inwards by `shift` (K,) dimensionless units."""
    sign, bound, scale = table[:, :3].unbind(1)
    return table.index_copy(1, table.new_tensor([1]).long(), (bound - sign * scale * shift)[:, None])


def task_share(shift: Tensor) -> Tensor:
    """() float64 in [0.1, 1], what the task's clipped step is multiplied by, from the shifts (K,)."""
    if not len(shift):
        return shift.new_ones(())
    return torch.exp((FUTILE - shift.max()) / SOFTNESS).clamp(LEAST_SHARE, 1.0)
