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

from l3ms.constraints.constraint import Constraint

FLAT = 2.0  # mu^2 over half a range from which on the barrier is told to be flat


class MuSchedule(Protocol):
    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    def __call__(self, step: Tensor, mu: Tensor, noise: Tensor) -> Tensor:
        """mu after `step` () int64 constraint steps; `mu` () float64 is the current one, `noise` () the largest standard error of a
        dimensionless constraint, twice that of one with two bounds."""
        ...


@dataclass(frozen=True)
class ExponentialDecay:
    """The paper's schedule: start -> end in `steps` equal factors, then constant.

    Once the noise of the estimates moves the multipliers by more than a clipped step, they are a switch and the iterate swings; see
    `NoiseFloorDecay`.
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
    """start -> the noise floor of the estimates in `steps` steps, and on towards `end` as the noise falls. This is `mu="auto"`.

    mu never falls faster than in the paper's schedule, which is what remains where there is no noise; it rises as fast where the noise has
    grown: responses that are all cut at one length have none, and those that have learnt to end have much.
    """

    def __call__(self, step: Tensor, mu: Tensor, noise: Tensor) -> Tensor:
        fastest = (self.end / self.start) ** (1 / self.steps)
        floor = noise_floor(noise).clamp(self.end, self.start)
        remaining = (self.steps + 1 - step.double()).clamp(min=1.0)
        falling = (floor / mu).pow(1 / remaining).clamp(min=fastest)
        factor = torch.where(floor > mu, (floor / mu).clamp(max=1 / fastest), falling)
        return torch.where(noise.isinf(), mu, mu * factor)


def noise_floor(noise: Tensor) -> Tensor:
    """The mu at which a standard error of the dimensionless constraint moves its multiplier by 1/2: beyond the bound its slope is 1/mu^3.

    Half-steps are clipped to norm 1 and gradients of a constraint are of that order, so a multiplier that noise moves by more than
    that is a switch, and the mean swings. In a range of two bounds both slopes add up: `noise` is twice the standard error then.
    What a mu so large leaves of bias, `shifts` takes away.
    """
    return (2 * noise) ** (1 / 3)


def flat_across(constraint: Constraint, mu: float) -> bool:
    """Whether the barrier's pull hardly changes across the range of a constraint whose scale nobody gave.

    It is a parabola nearer to a bound than mu^2; where that is more than the whole range, both sides pull alike at each end of it.
    """
    half = constraint.width / 2
    if constraint.scale is not None or constraint.monitor or not 0 < half < math.inf:
        return False
    return mu**2 > FLAT * half / constraint.unit


def scale_to_set(constraint: Constraint) -> str:
    """The words of a warning about a constraint that is `flat_across` its range: what it is, and what to do."""
    half = constraint.width / 2
    return f"flat across a range this narrow for its scale of {constraint.unit:g}; set scale: {half:g}, half the range, or sample more"


def as_schedule(mu: "str | MuSchedule", steps: int = 500) -> MuSchedule:
    """`"auto"`, `"paper"` or a schedule."""
    if mu == "auto":
        return NoiseFloorDecay(steps=steps)
    if mu == "paper":
        return ExponentialDecay(steps=steps)
    if isinstance(mu, type) or not (callable(mu) and hasattr(mu, "start") and hasattr(mu, "end")):
        raise ValueError(
            f'mu must be "auto", "paper" or a schedule such as l3ms.ExponentialDecay(steps=500), got {mu!r}'
        )
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
