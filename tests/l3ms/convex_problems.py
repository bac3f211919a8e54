"""Convex problems made from their solution: min f(x), f strongly convex and quadratic, under linear and convex quadratic constraints.

x* and the multipliers are chosen first, then the bounds so that the chosen constraints are active, and the linear part of f last, so that
grad f(x*) + sum_k lambda_k grad C_k(x*) = 0. Nothing is solved. C_k = sign (v(x) - bound) / scale, as the constraints have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import l3ms
from l3m_kernels import barrier_multiplier, relaxed_log_barrier


@dataclass
class Problem:
    """n variables, m values that are constrained, K bounds on them: all float64."""

    hessian: Tensor  # (n, n) of f
    linear: Tensor  # (n,) of f
    slopes: Tensor  # (m, n): v = slopes x + x' curved x / 2
    curved: Tensor  # (m, n, n), positive semi-definite
    constraints: list[l3ms.Constraint]
    solution: Tensor  # (n,)
    multipliers: Tensor  # (K,) in the order of the bounds; where they are not unique, one choice
    unique: bool  # the multipliers are, and all active constraints have one
    violated: list[int] = field(default_factory=list)  # values that conflict
    violations: Tensor | None = None  # (len(violated),) C at the least violation

    def __post_init__(self) -> None:
        rows = [row for i, constraint in enumerate(self.constraints) for row in constraint.rows(i)]
        self.owner = torch.tensor([row[0] for row in rows])
        self.sign, self.bound, self.scale = torch.tensor([row[1:4] for row in rows], dtype=torch.float64).unbind(1)

    def objective(self, x: Tensor) -> Tensor:
        return 0.5 * x @ self.hessian @ x + self.linear @ x

    def values(self, x: Tensor) -> Tensor:
        """(m,)"""
        return self.slopes @ x + 0.5 * (self.curved @ x) @ x

    def named(self, x: Tensor) -> dict[str, Tensor]:
        return {c.name: value for c, value in zip(self.constraints, self.values(x), strict=True)}

    def violation(self, x: Tensor) -> Tensor:
        """(K,) C, positive where violated."""
        return self.sign * (self.values(x)[self.owner] - self.bound) / self.scale

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) of f and (K, n) of C."""
        of_values = self.slopes + self.curved @ x
        return self.hessian @ x + self.linear, (self.sign / self.scale)[:, None] * of_values[self.owner]

    def barrier(self, x: Tensor, mu: Tensor) -> float:
        return float(self.objective(x) + relaxed_log_barrier(self.violation(x), mu).sum())

    def newton(self, x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """Of the barrier problem: L with L L' = its second derivative (n, n), and its gradient (n,)."""
        z = self.violation(x).requires_grad_()
        slope = barrier_multiplier(z, mu)
        (curvature,) = torch.autograd.grad(slope.sum(), z)
        slope = slope.detach()
        own, others = self.gradients(x)
        per_value = torch.zeros(len(self.slopes), dtype=torch.float64).index_add(
            0, self.owner, slope * self.sign / self.scale
        )
        second = self.hessian + (others * curvature[:, None]).T @ others
        bent = per_value @ self.curved.flatten(1)
        second = second + bent.reshape_as(self.hessian)
        return torch.linalg.cholesky(second), own + slope @ others


def _hessian(draw: np.random.Generator, n: int) -> np.ndarray:
    basis, _ = np.linalg.qr(draw.normal(size=(n, n)))
    return (basis * 10 ** draw.uniform(-1.0, 1.0, n)) @ basis.T


class Maker:
    """Collects constraints through x*, each with the multipliers of its bounds."""

    def __init__(self, seed: int, most: int = 50):
        self.draw = np.random.default_rng([7, seed])
        self.n = int(self.draw.integers(2, most + 1))
        self.x = self.draw.normal(size=self.n)
        self.inwards = self.draw.normal(
            size=self.n
        )  # from x*: all constraints hold there strictly, a barrier needs room
        self.slopes: list[np.ndarray] = []
        self.curved: list[np.ndarray] = []
        self.constraints: list[l3ms.Constraint] = []
        self.multipliers: list[float] = []

    def value(self, curved: bool) -> float:
        """A value of slope about 1 at x*, which falls inwards; what it is there."""
        n, bend = self.n, np.zeros((self.n, self.n))
        if curved:
            root = self.draw.normal(size=(max(1, n // 2), n))  # semi-definite
            bend = 0.5 * root.T @ root / n
        slope = self.draw.normal(size=n)
        along = self.inwards / np.linalg.norm(self.inwards)
        slope -= (slope @ along + self.draw.uniform(0.1, 2.0)) * along
        slope *= 10 ** self.draw.uniform(-0.5, 0.5) / math.sqrt(n)
        if not curved and self.draw.random() < 0.5:
            slope = -slope  # falls outwards, for a lower bound
        self.slopes.append(slope - bend @ self.x)
        self.curved.append(bend)
        return float(self.slopes[-1] @ self.x + 0.5 * self.x @ bend @ self.x)

    def bind(self, at: float, multiplier: float, slack: float, kind: str) -> None:
        """A constraint on the last value: its near bound is `slack` units beyond what it is at x*, `multiplier` >= 0."""
        name = f"c{len(self.constraints)}"
        bend = self.curved[-1]
        above = float((self.slopes[-1] + bend @ self.x) @ self.inwards) < 0
        scale = 10 ** self.draw.uniform(-0.5, 0.5)
        if kind == "one" and above:
            made = l3ms.Constraint(name, max=at + slack * scale, scale=scale, margin=0.0)
            own = [multiplier]
        elif kind == "one":
            made = l3ms.Constraint(name, min=at - slack * scale, scale=scale, margin=0.0)
            own = [multiplier]
        else:  # both sides, of which one is the near one
            width = scale * 10 ** self.draw.uniform(-3.0, 0.5) + 2 * slack * scale
            low = at + slack * scale - width if above else at - slack * scale
            made = l3ms.Constraint(name, min=low, max=low + width, scale=scale, margin=0.0)
            own = [0.0, multiplier] if above else [multiplier, 0.0]
        self.constraints.append(made)
        self.multipliers += own

    def some(self, multiplier: float, slack: float) -> None:
        curved = self.draw.random() < 0.3
        kind = "one" if curved or self.draw.random() < 0.6 else "both"
        self.bind(self.value(curved), multiplier, slack, kind)

    def again(self) -> None:
        """The last constraint in other units: multipliers that only their sum is known of."""
        last = self.constraints[-1]
        factor = 10 ** self.draw.uniform(-0.5, 0.5)
        self.slopes.append(self.slopes[-1])
        self.curved.append(self.curved[-1])
        options = {"min": last.min, "max": last.max, "scale": last.unit * factor, "margin": 0.0}
        self.constraints.append(l3ms.Constraint(f"c{len(self.constraints)}", **options))
        self.multipliers += [0.0] * len(last.rows(0))

    def problem(self, unique: bool) -> Problem:
        tensors = (np.array(self.slopes), np.array(self.curved), self.x, np.array(self.multipliers))
        slopes, curved, x, multipliers = map(torch.from_numpy, tensors)
        hessian = torch.from_numpy(_hessian(self.draw, self.n))
        made = Problem(hessian, torch.zeros_like(x), slopes, curved, self.constraints, x, multipliers, unique)
        own, others = made.gradients(x)
        made.linear = -(own + multipliers @ others)
        return made


def feasible(seed: int) -> Problem:
    """Every other one degenerate: weakly active constraints, one that is there twice, or more active ones than variables."""
    maker = Maker(seed)
    draw, degenerate = maker.draw, seed % 2 == 1
    for _ in range(int(draw.integers(0, min(maker.n, 10) + 1))):
        maker.some(10 ** draw.uniform(-1.0, 1.0), 0.0)
    if degenerate:
        what = draw.integers(3)
        if what == 0:
            for _ in range(int(draw.integers(1, 3))):
                maker.some(0.0, 0.0)
        elif what == 1:
            maker.some(10 ** draw.uniform(-1.0, 1.0), 0.0)
            maker.again()
        else:
            for _ in range(maker.n + 1 if maker.n <= 10 else 3):
                maker.some(10 ** draw.uniform(-1.0, 1.0), 0.0)
    for _ in range(int(draw.integers(0, 9))):
        maker.some(0.0, 10 ** draw.uniform(-1.0, 1.0))
    if not maker.constraints:
        maker.some(1.0, 0.0)
    return maker.problem(unique=not degenerate)


def equalities(seed: int) -> Problem:
    """Ranges of no width, beside constraints that are slack."""
    maker = Maker(seed, most=20)
    draw = maker.draw
    for _ in range(int(draw.integers(1, min(maker.n, 5) + 1))):
        at = maker.value(curved=False)
        scale = float(10 ** draw.uniform(-0.5, 0.5))
        maker.constraints.append(l3ms.Constraint(f"c{len(maker.constraints)}", min=at, max=at, scale=scale, margin=0.0))
        maker.multipliers += [0.0, float(10 ** draw.uniform(-1.0, 1.0))]
    for _ in range(int(draw.integers(0, 4))):
        maker.some(0.0, 10 ** draw.uniform(-0.5, 1.0))
    return maker.problem(unique=False)


def gentle(seed: int) -> Problem:
    """For noisy values: |grad f(x*)| is below 1, so that no half-step is clipped at rest; bounds cost something, lambda is above 1.5."""
    maker = Maker(seed, most=8)
    draw = maker.draw
    for _ in range(int(draw.integers(1, 3))):
        maker.bind(maker.value(bool(draw.random() < 0.3)), 10 ** draw.uniform(0.0, 0.5), 0.0, "one")
    for _ in range(int(draw.integers(0, 3))):
        maker.some(0.0, 10 ** draw.uniform(0.0, 1.0))
    first = maker.problem(unique=True)
    pull, _ = first.gradients(first.solution)
    shrink = draw.uniform(0.2, 0.8) / float(pull.norm())
    least = float(first.multipliers[first.multipliers > 0].min())
    widen = draw.uniform(1.5, 3.0) / (least * shrink)  # of the units, which multiplies the multipliers
    basis, _ = np.linalg.qr(draw.normal(size=(maker.n, maker.n)))
    curvature = torch.from_numpy((basis * draw.uniform(0.05, 0.2, maker.n)) @ basis.T)
    constraints = [
        l3ms.Constraint(c.name, min=c.min, max=c.max, scale=c.unit * widen, margin=c.margin) for c in first.constraints
    ]
    made = Problem(
        curvature, torch.zeros_like(first.linear), first.slopes, first.curved, constraints, first.solution,
        first.multipliers * shrink * widen, unique=True,
    )  # fmt: skip
    own, others = made.gradients(made.solution)
    made.linear = -(own + made.multipliers @ others)
    return made


def conflicting(seed: int) -> Problem:
    """Two to four linear constraints that cannot hold together, beside some that can: x* has the least sum of squared violations."""
    maker = Maker(seed, most=20)
    draw = maker.draw
    count = int(draw.integers(2, min(4, maker.n + 1) + 1))
    violations = np.sort(draw.uniform(0.2, 1.0, count))
    violations *= np.linspace(1.0, 1.6, count)
    draw.shuffle(violations)
    scales = 10 ** draw.uniform(-0.5, 0.5, count)
    slopes = [draw.normal(size=maker.n) / math.sqrt(maker.n) for _ in range(count - 1)]
    last = -sum(r * a for r, a in zip(violations, slopes, strict=False)) / violations[-1]  # sum_i r_i grad C_i = 0
    signs = draw.choice([-1.0, 1.0], count)
    for slope, r, scale, sign in zip([*slopes, last], violations, scales, signs, strict=True):
        a = sign * scale * slope  # grad C = sign a / scale
        bound = float(a @ maker.x) - sign * scale * r
        side = {"max": bound} if sign > 0 else {"min": bound}
        maker.slopes.append(a)
        maker.curved.append(np.zeros((maker.n, maker.n)))
        maker.constraints.append(l3ms.Constraint(f"c{len(maker.constraints)}", scale=float(scale), margin=0.0, **side))
        maker.multipliers.append(float(draw.uniform(0.0, 1.0)))  # of f's pull along them
    for _ in range(int(draw.integers(0, 5))):
        maker.some(0.0, 10 ** draw.uniform(-0.5, 1.0))
    made = maker.problem(unique=False)
    made.violated, made.violations = list(range(count)), torch.from_numpy(violations)
    return made
