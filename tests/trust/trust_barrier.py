"""G6: the barrier, its slope lambda and its curvature at random (z, mu), against 50 digits, by every op and backend that computes them.

mu is of the paper's schedule, of ours, or anything in [1e-7, 1]; s is mu^2 or given. z is of all sizes in [-1e6, 1e6], subnormal too, and
lies around -s, -2s, 0 and -1, where the formula changes or cancels. mpmath's numbers are used without its contexts: a point takes 20 us.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from mpmath.libmp import (
    from_float,
    from_int,
    fzero,
    mpf_add,
    mpf_cmp,
    mpf_div,
    mpf_log,
    mpf_mul,
    mpf_neg,
    mpf_sub,
    to_float,
)
from parts import Found, Part, Skipped
from torch import Tensor

from l3m_kernels import Bounds, barrier_multiplier, barrier_weights, initial_state, relaxed_log_barrier
from l3m_kernels.backends import TABLE
from l3ms.barrier.schedules import ExponentialDecay, NoiseFloorDecay

BITS = 200  # 60 digits
BLOCK = 250  # points of one mu
# ulps; of the value, which is for display, at the size of its terms: a square doubles the error of the ratio and of mu^2
ALLOWED = {"value": 8.0, "lambda": 4.0, "curvature": 4.0}
BACKENDS = [row.name for row in TABLE if row.problem("barrier_weights", "cpu") is None]
Computed = tuple[str, list[float]]  # what, and its values
ONE, TWO = from_int(1), from_int(2)
_add, _sub, _mul, _div = (partial(f, prec=BITS, rnd="n") for f in (mpf_add, mpf_sub, mpf_mul, mpf_div))


class Block(NamedTuple):
    mu: float
    s: float | None  # None: mu^2, not rounded
    z: list[float]


def block(number: int) -> Block:
    draw = random.Random(number)
    mu = random_mu(draw)
    s = 10 ** draw.uniform(-14, 0) if draw.random() < 0.2 else None
    return Block(mu, s, [random_z(draw, mu * mu if s is None else s) for _ in range(BLOCK)])


def random_mu(draw: random.Random) -> float:
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice((1.0, 1e-7, math.nextafter(1e-7, 1), math.nextafter(1.0, 0), 1e-6, 0.1, 0.5, 2**-23))
    if kind == 1:
        return 10 ** draw.uniform(-7, 0)
    if kind == 2:
        return draw.uniform(1e-7, 1)
    step, now = torch.tensor(draw.randrange(1100)), torch.tensor(10 ** draw.uniform(-6, 0), dtype=torch.float64)
    noise = torch.tensor(draw.choice((0.0, math.inf, 10 ** draw.uniform(-12, 1))), dtype=torch.float64)
    schedule = (ExponentialDecay if kind == 3 else NoiseFloorDecay)(steps=draw.choice((1, 7, 500, 1000)))
    return schedule(step, now, noise).item()


def random_z(draw: random.Random, s: float) -> float:
    kind = draw.randrange(9)
    if kind == 0:
        return draw.choice((-1, 1)) * 10 ** draw.uniform(-20, 6)
    if kind == 1:  # by ulps
        z = draw.choice((-s, -2 * s, -1.0, s))
        for _ in range(draw.randrange(4)):
            z = math.nextafter(z, draw.choice((-math.inf, math.inf)))
        return z
    if kind == 2:
        return -s * (1 + draw.choice((-1, 1)) * 10 ** draw.uniform(-17, 0))
    if kind == 3:
        return draw.uniform(-4, 4) * s
    if kind == 4:
        return draw.choice((0.0, -0.0, 1e6, -1e6, 5e-324, -5e-324, 2.0**-1022, -(2.0**-1022), s * 2.0**-60))
    if kind == 5:  # subnormal
        return draw.choice((-1, 1)) * draw.getrandbits(draw.randint(1, 52)) * 5e-324
    if kind == 6:  # where the logarithm cancels
        return -1 - draw.choice((-1, 1)) * 10 ** draw.uniform(-16, 0)
    if kind == 7:
        return draw.uniform(-1e6, 1e6)
    return draw.uniform(-2, 2)


class Exact:
    """The functions of one mu and s, in numbers of mpmath."""

    def __init__(self, mu: float, s: float | None):
        self.mu = from_float(mu)
        self.s = _mul(self.mu, self.mu) if s is None else from_float(s)
        self.negative_s = mpf_neg(self.s)
        self.slope = _div(self.mu, self.s)
        self.curvature = _div(self.slope, self.s)
        self.end = _mul(self.mu, mpf_log(self.s, BITS, "n"))

    def __call__(self, z: float) -> dict[str, tuple[tuple, float]]:
        """-> by name, what it is and the size of the terms that make it."""
        at = from_float(z)
        if mpf_cmp(at, self.negative_s) <= 0:
            slack = mpf_neg(at)
            value = mpf_neg(_mul(self.mu, mpf_log(slack, BITS, "n")))
            slope = _div(self.mu, slack)
            return self._sized(value, slope, _div(slope, slack), abs(to_float(value)))
        ratio = _add(_div(at, self.s), TWO)
        parabola = _mul(_div(self.mu, TWO), _sub(_mul(ratio, ratio), ONE))
        size = max(abs(to_float(parabola)), abs(to_float(self.end)), to_float(self.mu))
        return self._sized(_sub(parabola, self.end), _mul(self.slope, ratio), self.curvature, size)

    @staticmethod
    def _sized(value: tuple, slope: tuple, curvature: tuple, size: float) -> dict[str, tuple[tuple, float]]:
        return {
            "value": (value, size),
            "lambda": (slope, to_float(slope)),
            "curvature": (curvature, to_float(curvature)),
        }


def ulps(found: float, wanted: tuple, size: float) -> float:
    """How far `found` is from `wanted`, in units of the spacing of the numbers at `size`."""
    if not math.isfinite(found):
        return math.inf
    error = mpf_sub(from_float(found), wanted, 53, "n")
    return 0.0 if error == fzero else abs(to_float(error)) / math.ulp(size)


def points(seeds: range) -> Iterator[tuple[int, range]]:
    """The blocks that seeds are of, and which points of them."""
    for number in range(seeds.start // BLOCK, -(-seeds.stop // BLOCK)):
        yield number, range(max(seeds.start - number * BLOCK, 0), min(seeds.stop - number * BLOCK, BLOCK))


def check(seeds: range, compute: Callable[[Tensor, float, float | None], Iterable[Computed]]) -> Found:
    found = Found()
    worst = dict.fromkeys(ALLOWED, 0.0)
    for number, inside in points(seeds):
        mu, s, z = block(number)
        exact = Exact(mu, s)
        z = z[inside.start : inside.stop]
        computed = list(compute(torch.tensor(z, dtype=torch.float64), mu, s))
        for index, at in enumerate(z):
            seed, share, wrong = number * BLOCK + inside.start + index, 0.0, ""
            wanted = exact(at)
            for name, result in {(name, values[index]) for name, values in computed}:
                error = ulps(result, *wanted[name])
                worst[name] = max(worst[name], error)
                share = max(share, error / ALLOWED[name])
                if not error <= ALLOWED[name]:
                    wrong = f"{name} is {result!r}, {error:.3g} ulp from {to_float(wanted[name][0])!r}"
            found.cases += 1
            found.measure(share, f"seed {seed}")
            if wrong:
                found.fail(f"seed {seed}: z {at!r}, mu {mu!r}, s {s!r}: {wrong}")
    found.figures = {f"{name}, ulp": error for name, error in worst.items() if error}
    return found


def by_ops(z: Tensor, mu: float, s: float | None) -> Iterable[Computed]:
    """The public functions, their derivatives as autograd has them, and the backends that run on a CPU as it is."""
    z = z.requires_grad_()
    value = relaxed_log_barrier(z, mu, s)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    multiplier = barrier_multiplier(z, mu, s)
    (curvature,) = torch.autograd.grad(multiplier.sum(), z, retain_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), z)
    yield "value", value.tolist()
    for values in (slope, multiplier):
        yield "lambda", values.tolist()
    for values in (curvature, second):
        yield "curvature", values.tolist()
    for backend in BACKENDS:
        if backend != "triton":
            yield "lambda", by_weights(backend, z.detach(), mu, s)


def by_triton(z: Tensor, mu: float, s: float | None) -> Iterable[Computed]:
    if "triton" not in BACKENDS:
        raise Skipped(next(row.missing for row in TABLE if row.name == "triton") or "it does not run on a CPU here")
    import interpreter

    interpreter.prepare()
    yield "lambda", by_weights("triton", z, mu, s)


def by_weights(backend: str, z: Tensor, mu: float, s: float | None) -> list[float]:
    """lambda of `barrier_weights`: a reward for each z, bounded by 0 from above, or its negative from below."""
    sign = torch.ones_like(z)
    sign[1::2] = -1
    bounds = Bounds.of([(column, each, 0.0, 1.0, 0.0, 0.0, math.inf) for column, each in enumerate(sign.tolist())])
    out = barrier_weights((sign * z)[None], initial_state(len(z)), bounds, mu, s=s, backend=backend)
    if not torch.equal(out.violation, z):
        raise AssertionError(f"{backend}: the violation is not the estimate minus a bound of 0")
    total = max(1.0, math.fsum(out.multiplier.tolist()))
    if not abs(out.total.item() - total) <= len(z) * math.ulp(total):
        raise AssertionError(f"{backend}: total {out.total.item()!r} is not the sum of the multipliers, {total!r}")
    return out.multiplier.tolist()


def parts() -> list[Part]:
    triton = {"TRITON_INTERPRET": "1"}
    return [
        Part("ops on a CPU", partial(check, compute=by_ops), 1_000_000, 10_000, 50_000, seconds=100),
        Part("triton interpreted", partial(check, compute=by_triton), 5_000, environment=triton, seconds=30),
    ]
