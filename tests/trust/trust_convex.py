"""G7: convex problems whose solution is known, reached by `L3MOptimizer` around torch's SGD with a mu of the user's own.

Exact solves take joint steps on z, x = base + P z, P P' the inverse of the barrier problem's second derivative: plain SGD on z is then
Newton's method on x. What is minimised, the multipliers, their sum S, mu and the clipping are the optimizer's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from convex_problems import Problem, conflicting, equalities, feasible, gentle
from parts import Found, Part, each
from steps_by_hand import same_bits
from torch import Tensor

import l3ms

MU = 2e-7  # where mu ends: complementarity, lambda times slack, is mu
ALLOWED = 1e-6


@dataclass
class WhenCentred:
    """mu falls by `factor` once the loop says that it is at the minimum for the one before."""

    end: float
    start: float = 1.0
    factor: float = 0.2
    centred: bool = False

    def __call__(self, step: Tensor, mu: Tensor, noise: Tensor) -> Tensor:
        return (mu * self.factor).clamp(min=self.end) if self.centred else mu


class Solve:
    """Of one problem."""

    def __init__(self, problem: Problem, x: Tensor, end: float, **options: Any):
        self.problem, self.base, self.schedule = problem, x.clone(), WhenCentred(end)
        self.z = torch.nn.Parameter(torch.zeros_like(x))
        options = {"smoothing": 1.0, "max_grad_norm": None, **options}
        self.sgd = torch.optim.SGD([self.z], lr=1.0)
        self.opt = l3ms.L3MOptimizer(self.sgd, problem.constraints, mu=self.schedule, **options)

    def newton(self) -> float:
        """One step of the whole barrier problem, as long as it decreases. -> Newton's decrement before it."""
        problem, mu = self.problem, self.opt.mu
        factor, gradient = problem.newton(self.base, mu)
        scaled = torch.linalg.solve_triangular(factor, gradient[:, None], upper=False)[:, 0]
        inverse = torch.linalg.inv(factor).T
        decrement, length = float(scaled.norm()), 1.0
        before = problem.barrier(self.base, mu)
        if decrement**2 > 1e-9 * max(1.0, abs(before)):  # else rounding decides
            while problem.barrier(self.base - length * inverse @ scaled, mu) > before - 0.1 * length * decrement**2:
                length *= 0.5
                if length < 1e-12:
                    break
        self.sgd.param_groups[0]["lr"] = length
        self.schedule.centred = decrement**2 < 0.1 * float(mu)
        x = self.base + inverse @ self.z
        loss = self.opt.barrier_loss(problem.named(x))
        (self.opt.task_weight * problem.objective(x) + loss).backward()
        self.opt.step()
        self.opt.zero_grad()
        with torch.no_grad():
            self.base += inverse @ self.z
            self.z.zero_()
        return decrement

    def solve(self, most: int = 300) -> None:
        at_rest = 0
        for _ in range(most):
            last = float(self.opt.mu) <= self.schedule.end
            at_rest += self.newton() ** 2 < 1e-9 * float(self.opt.mu) and last
            if at_rest == 3:  # Newton's method squares its error
                return
        raise AssertionError(f"Newton's method is not at rest after {most} steps")


def begun(problem: Problem, seed: int, distance: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return problem.solution + distance * torch.randn(len(problem.solution), dtype=torch.float64, generator=generator)


def shortfall(problem: Problem, x: Tensor, multiplier: Tensor, at: Tensor | None = None) -> tuple[float, float, float]:
    """Stationarity, relative to max(1, |grad f|), feasibility and complementarity. `at`: of the constraints, where that is not x."""
    y = x if at is None else at
    own, others = problem.gradients(x)[0], problem.gradients(y)[1]
    violation = problem.violation(y)
    stationarity = float((own + multiplier @ others).abs().max()) / max(1.0, float(own.abs().max()))
    return stationarity, float(violation.max().clamp(min=0.0)), float((multiplier * violation).abs().max())


def reported(problem: Problem, opt: l3ms.L3MOptimizer) -> Tensor:
    """(K,) multipliers, which are those of the metrics: of both sides of a range together."""
    last, values = opt.estimates.last, opt.metrics()
    assert last is not None
    for i, constraint in enumerate(problem.constraints):
        told, kept = values[f"constraints/{constraint.name}/lambda"], float(last.multiplier[problem.owner == i].sum())
        assert told == kept, f"{constraint.name}: the metrics have a multiplier of {told}, it is {kept}"
    assert float(last.multiplier.min()) >= 0
    return last.multiplier


def exact(seed: int) -> float:
    """The worst of stationarity, feasibility and complementarity, as a share of 1e-6."""
    problem = feasible(seed)
    solve = Solve(problem, begun(problem, seed, 0.1 if seed % 3 == 0 else 3.0), MU)
    solve.solve()
    multiplier = reported(problem, solve.opt)
    # Duality: what the barrier leaves of f is at most mu for each bound; and how far that is, f being strongly convex.
    gap, most = float(problem.objective(solve.base) - problem.objective(problem.solution)), len(multiplier) * MU
    assert abs(gap) < 1.01 * most + 1e-9, f"f is {gap:.3g} from its known minimum, {most:.3g} is left by the barrier"
    far = float((solve.base - problem.solution).norm())
    reach = math.sqrt(2.02 * most / float(torch.linalg.eigvalsh(problem.hessian)[0]))
    assert far < reach, f"x is {far:.3g} from the known solution, {reach:.3g} is left by the barrier"
    if problem.unique:
        active = problem.gradients(problem.solution)[1][problem.multipliers > 0]
        known = (
            float(torch.linalg.svdvals(active)[-1]) if len(active) else 1.0
        )  # how well slopes tell multipliers apart
        off = float(((multiplier - problem.multipliers).abs() / (1 + problem.multipliers)).max())
        assert off < 1e-3 / min(known, 1.0), (
            f"a multiplier is off by {off:.3g} of 1 + it, the slopes' least singular value is {known:.3g}"
        )
    return max(shortfall(problem, solve.base, multiplier)) / ALLOWED


def alternating(seed: int) -> float:
    """Half-steps, as users take them: at rest grad f(x) + sum lambda(y) grad C(y) = 0, x before the one and y before the other."""
    problem, mu = feasible(seed), 0.01
    solve = Solve(problem, begun(problem, seed, 1.0), mu, max_grad_norm=1e3 if seed % 2 else None)
    solve.solve()
    opt, z = solve.opt, solve.z
    factor, _ = problem.newton(solve.base, opt.mu)
    inverse = torch.linalg.inv(factor).T  # from here on plain SGD, in the units of the barrier problem
    solve.sgd.param_groups[0]["lr"] = 0.1
    solve.base = solve.base + inverse @ (0.01 * torch.ones_like(z) * math.sqrt(mu / len(z)))  # not where it rests
    x = y = solve.base
    for _ in range(200):
        x = (solve.base + inverse @ z).detach()
        problem.objective(solve.base + inverse @ z).backward()
        opt.step()
        opt.zero_grad()
        y = (solve.base + inverse @ z).detach()
        opt.barrier_loss(problem.named(solve.base + inverse @ z)).backward()
        opt.step()
        opt.zero_grad()
    stationarity, feasibility, complementarity = shortfall(problem, x, reported(problem, opt), y)
    return max(stationarity, feasibility, abs(complementarity - mu)) / ALLOWED


def ranges_of_no_width(seed: int) -> float:
    """min = max: what the value's multiplier is, is the difference of its sides', each 2 / mu: a mu of 0.003 resolves it."""
    problem = equalities(seed)
    solve = Solve(problem, begun(problem, seed, 1.0), 0.003)
    solve.solve()
    stationarity, feasibility, _ = shortfall(problem, solve.base, reported(problem, solve.opt))
    return max(stationarity, feasibility) / ALLOWED  # beyond -s the slope of lambda is 1 / mu^3


def conflict(seed: int) -> float:
    """What cannot hold ends at the least sum of squared violations, to the s = mu^2 of the relaxation; the worst two are named."""
    problem, mu = conflicting(seed), 1e-3
    solve = Solve(problem, begun(problem, seed, 1.0), mu)
    solve.solve()
    for _ in range(110):
        solve.newton()
    violation = problem.violation(solve.base)
    count = len(problem.violated)
    assert problem.violations is not None
    off = float((violation[:count] - problem.violations).abs().max())
    assert float(violation[count:].max().clamp(min=0.0) if len(violation) > count else 0.0) <= 0, (
        "another one is violated"
    )
    first, second = sorted(torch.argsort(problem.violations, descending=True)[:2].tolist())
    pairs = solve.opt.conflicts.pairs
    assert pairs == [(f"c{first}", f"c{second}")], f"wanted c{first} and c{second}, got {pairs}"
    return off / (2 * math.sqrt(count) * mu**2 + 1e-6)


STEPS, BATCH = 400, 8
LONGER = 4  # times as many, where values move so little in a step that shifts and multipliers have not settled


class Noisy:
    """A run as users have it: default mu and smoothing, half-steps, batches of 8 values with noise. The band, and where it ends."""

    def __init__(self, seed: int, steps: int):
        problem, generator = gentle(seed), torch.Generator().manual_seed(seed)
        x = torch.nn.Parameter(begun(problem, seed, 1.0))
        unit = torch.tensor([c.unit for c in problem.constraints], dtype=torch.float64)
        deviation = unit * 10 ** (-1.5 + 1.2 * torch.rand(len(unit), dtype=torch.float64, generator=generator))
        constraints = [l3ms.Constraint(c.name, min=c.min, max=c.max, scale=c.unit) for c in problem.constraints]
        sgd = torch.optim.SGD([x], lr=0.5)
        base = sgd if seed % 2 == 0 else torch.optim.AdamW([x], lr=0.02, betas=(0.5, 0.95))
        opt = l3ms.L3MOptimizer(base, constraints, clipping="adaptive")
        rate = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=steps)
        covered, ends, left = [], [], []
        for _ in range(steps):
            share = opt.task_share
            problem.objective(x).backward()
            opt.step()
            opt.zero_grad()
            values = problem.values(x)
            noise = deviation[:, None] * torch.randn(len(values), BATCH, dtype=torch.float64, generator=generator)
            opt.barrier_loss({c.name: values[i] + noise[i] for i, c in enumerate(constraints)}).backward()
            opt.step()
            opt.zero_grad()
            rate.step()
            last = opt.estimates.last
            assert last is not None
            covered.append((last.estimate - values.detach()).abs() <= 1.96 * last.stderr)
            ends.append(problem.violation(x.detach()))
            left.append(opt.mu / share)
        self.bound = problem.multipliers > 0
        self.end, self.left = torch.stack(ends)[-steps // 4 :].mean(0), float(torch.stack(left)[-steps // 4 :].mean())
        self.error = (deviation / unit / math.sqrt(BATCH))[problem.owner]  # of a batch
        slack = self.left / problem.multipliers + 3.5 * (last.stderr / unit)[problem.owner]
        self.share = max(float((self.end / (0.5 * self.error)).max()), float((-self.end / slack)[self.bound].max()))
        inside = torch.stack(covered)[2:].double()
        late = inside[steps // 2 :]
        sums = {"seen": inside.numel(), "covered": inside.sum(), "seen late": late.numel(), "covered late": late.sum()}
        sums |= {"inside": (-self.end / self.error)[self.bound].sum(), "bounds": self.bound.sum()}
        self.sums = {name: float(value) for name, value in sums.items()}

    def __str__(self) -> str:
        end, error = self.end[self.bound].tolist(), self.error[self.bound].tolist()
        return f"it ends at C = {end}, mu over the task's share {self.left:.3g}, a batch's error {error}"


def noisy(seeds: range) -> Found:
    found = Found()
    for seed in seeds:
        found.cases += 1
        run, slow = Noisy(seed, STEPS), 0.0
        if not run.share <= 1:
            run, slow = Noisy(seed, LONGER * STEPS), 1.0
        found.measure(run.share, f"seed {seed}")
        if not run.share <= 1:
            found.fail(f"seed {seed}: {run}")
        found.add(Found(sums={**run.sums, "slow": slow}))
    return found


def covers(found: Found) -> None:
    """The 95% band, of means that move slower or faster or rest: 9 in 10 steps, all runs together."""
    if not found.sums:
        return
    for late in ("", " late"):
        share = found.sums["covered" + late] / found.sums["seen" + late]
        found.figures["band covers" + (", second half" if late else "")] = f"{share:.1%}"
        if found.cases >= 20 and not share >= 0.9:
            found.fail(f"the band covers {share:.1%} of the steps{late}, claimed are 90%")
    found.figures[f"settled after {LONGER * STEPS:,} steps, not {STEPS}"] = round(found.sums["slow"])
    found.figures["ends inside, in errors of a batch, mean"] = found.sums["inside"] / found.sums["bounds"]


def parts() -> list[Part]:
    return [
        Part("exact", partial(each, exact), 600, slice=3, piece=100, seconds=180),
        Part("half-steps", partial(each, alternating), 40, slice=1, piece=20, seconds=35),
        Part("equalities", partial(each, ranges_of_no_width), 40, slice=1, piece=40, seconds=10),
        Part("conflicting", partial(each, conflict), 50, slice=1, piece=25, seconds=25),
        Part("noisy", noisy, 100, slice=1, piece=20, seconds=110, close=covers),
        Part("by hand", partial(each, same_bits), 200, slice=10, piece=100, seconds=16),
    ]
