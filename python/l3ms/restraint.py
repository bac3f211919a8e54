"""Adaptive clipping: what the task's step is multiplied by while a bound is violated and stays violated.

Half-steps are clipped to the same norm, and the constraints' gradient is mostly noise of its samples: the part of a clipped step that
points towards the bound may be less than the task's pull, whatever lambda is. Then the bound is missed by as much as balances the two. The
only remedy within a clipped step is a smaller step of the task: integral control of its logarithm, one integrator for each bound,

    r_k <- clamp(r_k + rate u_k, 0, log 10),   share = exp(-max_k r_k),

where u_k in [-1, 1] is the violation in units of 2 standard errors, counted as 0 while it is positive but shrinking by itself. An estimate
that swings about its bound, or is on its way there, leaves the task alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SHARE = 0.1
RATE = 0.05  # of r a step: from 1 to LEAST_SHARE in 46
MEMORY = 0.05  # weight of a new violation in the slow average that says whether it shrinks


class Restraint(NamedTuple):
    """All (K,) float64 on one device."""

    level: Tensor  # r, >= 0
    slow: Tensor  # slow average of the violations; NaN before the first

    @classmethod
    def none(cls, bounds: int, device: torch.device) -> Restraint:
        zeros = torch.zeros(bounds, dtype=torch.float64, device=device)
        return cls(zeros, torch.full_like(zeros, math.nan))

    @property
    def share(self) -> Tensor:
        """() float64 in [0.1, 1]."""
        return torch.exp(-self.level.max()) if len(self.level) else self.level.new_ones(())

    def advance(self, violation: Tensor, noise: Tensor) -> Restraint:
        """After a constraint step: `violation` C (K,), margin included, NaN where nothing was observed, and its standard error (K,)."""
        two = (2 * noise.nan_to_num(0.0, posinf=0.0)).clamp(min=torch.finfo(torch.float64).tiny)
        pressure = (violation / two).clamp(-1.0, 1.0)
        shrinking = violation < self.slow - two / 2
        pressure = torch.where(shrinking, pressure.clamp(max=0.0), pressure).nan_to_num(0.0)
        slow = torch.where(self.slow.isnan(), violation, torch.lerp(self.slow, violation, MEMORY))
        level = (self.level + RATE * pressure).clamp(0.0, -math.log(LEAST_SHARE))
        return Restraint(level, torch.where(violation.isnan(), self.slow, slow))

    def where(self, applied: Tensor, advanced: Restraint) -> Restraint:
        """`advanced` where the step was `applied` () bool."""
        return Restraint(*(torch.where(applied, new, old) for new, old in zip(advanced, self, strict=True)))
