"""Where the multipliers come from: the barrier, or one of the methods that it is compared with.

A solver turns the violations C (K,) of the one-sided constraints into multipliers lambda (K,) >= 0; everything else (estimates, weights
of the responses, clipping, averages) is the same for all. C is dimensionless and positive where violated, the margin included. The
barrier needs no memory, its lambda is B'(C); the others keep one number per bound that advances with every applied constraint step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

SOLVERS = ("barrier", "dual_ascent", "augmented_lagrangian", "penalty")


class Solver(Protocol):
    def multipliers(self, violation: Tensor, memory: Tensor) -> Tensor:
        """(K,) float64 >= 0, from the violations by the moving averages, this batch included."""
        ...

    def advance(self, violation: Tensor, memory: Tensor) -> Tensor:
        """The memory (K,) float64 >= 0 after the step, from the violations by this step's batch alone."""
        ...


@dataclass(frozen=True)
class DualAscent:
    """Min-max: lambda <- max(0, lambda + rate C) after every step, by the batch's own C. The baseline of arXiv 2410.21533.

    Gradient ascent on the dual. lambda is the integral of the violation, so it goes on pushing until as much slack has been paid back,
    and the iterates oscillate about the bound; a larger rate means a shorter period.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        _positive("rate", self.rate)

    def multipliers(self, violation: Tensor, memory: Tensor) -> Tensor:
        return memory.clone()

    def advance(self, violation: Tensor, memory: Tensor) -> Tensor:
        return (memory + self.rate * violation.nan_to_num(0.0)).clamp(min=0.0)


@dataclass(frozen=True)
class AugmentedLagrangian(DualAscent):
    """lambda = max(0, memory + penalty C), with the memory of `DualAscent`: the quadratic penalty damps the oscillation.

    The method of multipliers (Hestenes, Powell) with one inner step: Nocedal and Wright, Numerical Optimization, chapter 17.
    """

    penalty: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("penalty", self.penalty)

    def multipliers(self, violation: Tensor, memory: Tensor) -> Tensor:
        return (memory + self.penalty * violation).clamp(min=0.0)


@dataclass(frozen=True)
class Penalty:
    """A fixed weight on the violation, `weight max(0, C)`: lambda is `weight` beyond the bound and 0 inside.

    Exact where `weight` exceeds the multiplier of the solution, which is not known beforehand; below it the bound is never met.
    """

    weight: float = 5.0

    def __post_init__(self) -> None:
        _positive("weight", self.weight)

    def multipliers(self, violation: Tensor, memory: Tensor) -> Tensor:
        return self.weight * (violation > 0).to(violation)

    def advance(self, violation: Tensor, memory: Tensor) -> Tensor:
        return memory


def as_solver(solver: str | Solver) -> Solver | None:
    """By name or as an object; None is the barrier."""
    named = {"dual_ascent": DualAscent, "augmented_lagrangian": AugmentedLagrangian, "penalty": Penalty}
    if solver == "barrier":
        return None
    if isinstance(solver, str) and solver in named:
        return named[solver]()
    if isinstance(solver, (str, type)) or not hasattr(solver, "multipliers") or not hasattr(solver, "advance"):
        raise ValueError(
            f"solver must be one of {', '.join(SOLVERS)}, or an object such as l3ms.DualAscent(rate=0.1), got {solver!r}"
        )
    return solver


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"solver: {name} must be positive and finite, got {value}")
