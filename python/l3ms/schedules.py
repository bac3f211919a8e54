"""How the barrier's temperature mu falls over a run: after n applied constraint steps, from the noise of the estimates.

mu is a 0-dim float64 tensor that stays on its device; a schedule returns the next one. The number of steps is a tensor too: which ones
were applied is known on the device alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from l3ms.constraints import Constraint


class MuSchedule(Protocol):
    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    def __call__(self, step: Tensor, mu: Tensor, noise: Tensor) -> Tensor:
        """mu after `step` () int64 constraint steps; `mu` () float64 is the current one, `noise` () the largest standard error of a
        dimensionless constraint."""
        ...


@dataclass(frozen=True)
class ExponentialDecay:
    """The paper's schedule: start -> end in `steps` equal factors, then constant.

    Once mu^2 is below the standard error of the estimates, multipliers become a switch and the iterate swings; see `NoiseFloorDecay`.
    """

    start: float = 1.0
    end: float = 1e-6
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.end <= self.start < float("inf")):
            raise ValueError(f"mu: wanted 0 < end <= start, got start {self.start}, end {self.end}")
        if self.steps < 1:
            raise ValueError(f"mu: steps must be at least 1, got {self.steps}")

    def __call__(self, step: Tensor, mu: Tensor, noise: Tensor) -> Tensor:
        fraction = (step.double() / self.steps).clamp(max=1.0)
        return self.start ** (1.0 - fraction) * self.end**fraction


@dataclass(frozen=True)
class NoiseFloorDecay(ExponentialDecay):
    """The paper's decay, stopped where it stops helping: at mu = sqrt(2 standard error), so that s = mu^2 spans the noise.

    mu never rises; it resumes its decay when the noise falls. This is `mu="auto"`.
    """

    def __call__(self, step: Tensor, mu: Tensor, noise: Tensor) -> Tensor:
        rate = (self.end / self.start) ** (1 / self.steps)
        return torch.maximum((mu * rate).clamp(min=self.end), torch.minimum(mu, noise_floor(noise)))


def noise_floor(noise: Tensor) -> Tensor:
    """The mu at which s = mu^2 is two standard errors of the dimensionless constraint."""
    return torch.sqrt(2 * noise)


def as_schedule(mu: "str | MuSchedule", steps: int = 500) -> MuSchedule:
    """`"auto"`, `"paper"` or a schedule."""
    if mu == "auto":
        return NoiseFloorDecay(steps=steps)
    if mu == "paper":
        return ExponentialDecay(steps=steps)
    if not callable(mu):
        raise ValueError(f'mu must be "auto", "paper" or a schedule such as l3ms.ExponentialDecay, got {mu!r}')
    return mu


def check_resolution(schedule: MuSchedule, constraints: Sequence[Constraint]) -> None:
    """ValueError where s = mu^2 ends below 4 ulp of a bound: float64 could not tell a slack of s from none."""
    for constraint in constraints:
        for _, _, bound, scale, *_ in constraint.rows(0):
            ulp = math.ulp(bound / scale)
            if schedule.end**2 < 4 * ulp:
                raise ValueError(
                    f"mu: its end {schedule.end:g} is too small for constraint {constraint.name!r}: mu^2 is below 4 ulp of "
                    f"the bound ({bound:g} in units of {scale:g}); end it above {2 * math.sqrt(ulp):.1e}"
                )
