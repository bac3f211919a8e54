"""What a bound costs the task: multipliers from probe gradients at the weights where a run stopped.

At a constrained optimum `g0 + sum_i lambda_i g_i = 0`, with g0 the gradient of the task loss, g_i that of the one-sided constraint C_i,
and lambda_i >= 0 the rate at which relaxing bound i lowers the task loss. So the prices are the lambda >= 0 that minimise
`||g0 + sum_i lambda_i g_i||`, and the residual, relative to ||g0||, says how near to such a point the run is. All that is needed is the
Gram matrix of the gradients. They are estimated (g_i by the score function, leave-one-out baseline), and the square of a noisy vector is
too large by its noise, which would make every price too small; so the Gram matrix is made of products of *different* batches of probes,
which are unbiased, and its jackknife over the batches gives the standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
CLEAR = 2.0  # standard errors above which a number is told from noise


class Solution(NamedTuple):
    """Of one set of probe gradients, K constraints."""

    multipliers: Matrix  # (K,) >= 0; NaN where the constraint's gradient cannot be told from noise
    stderr: Matrix  # (K,)
    residual: float  # ||g0 + sum lambda g|| / ||g0||; NaN where g0 cannot be told from noise


@dataclass(frozen=True)
class Price:
    """Of one one-sided bound."""

    name: str
    side: str  # min or max
    limit: float  # native units
    unit: str  # "tokens", or empty
    step: float  # native units, a round number near a tenth of the bound
    rate: float  # nats of task loss per native unit; NaN where it is not known
    stderr: float
    multiplier: float  # of the dimensionless constraint, as in the run's logs
    share: str = ""  # what is bounded where it is no mean, as P(long >= 200)
    inactive: str = ""  # why it was not measured: the constraint does not bind here, so its price is 0

    def sentence(self) -> str:
        """What relaxing the bound would bring, in words."""
        what = self.share or self.name
        bound = f"{what} {'>=' if self.side == 'min' else '<='} {self.limit:g}"
        if self.inactive:
            return f"{bound}: {self.inactive}; its price is 0"
        if not math.isfinite(self.rate):
            return (
                f"{bound}: no price, the gradient of the constraint cannot be told from noise; more --probes may help"
            )
        per = f"nats per {self.unit.removesuffix('s') or 'unit'}"
        if self.rate <= CLEAR * self.stderr:
            return f"{bound}: no price that stands out of the noise ({self.rate:.2g} ± {self.stderr:.2g} {per})"
        to = self.limit + (self.step if self.side == "max" else -self.step)
        more = ("fewer" if self.unit else "less") if self.side == "min" else "more"
        unit = self.unit.removesuffix("s") if self.step == 1 else self.unit
        much = f"{self.step:g} {more} {unit}".strip()
        gain, error = self.rate * self.step, self.stderr * self.step
        return (
            f"{what}: allowing {much} ({self.side} {self.limit:g} -> {to:g}) would lower the task loss "
            f"by about {gain:.2g} nats (± {error:.1g}, to first order)"
        )


@dataclass(frozen=True)
class Prices:
    """Of all bounds of a run."""

    bounds: list[Price]
    residual: float
    probes: int
    batches: int

    def sentences(self) -> list[str]:
        lines = [price.sentence() for price in self.bounds]
        if all(price.inactive for price in self.bounds):
            return lines
        if not math.isfinite(self.residual):
            return [*lines, "The gradient of the task cannot be told from noise: there is nothing to gain that shows."]
        return [
            *lines,
            f"Residual {self.residual:.2g}: the share of the task's gradient that these prices leave. At a constrained optimum it is 0; "
            "where it is large the run has not settled, and a price is the rate of exchange at the weights as they are.",
        ]

    def as_dict(self) -> dict[str, object]:
        bounds = [{**vars(price), "sentence": price.sentence()} for price in self.bounds]
        return {"bounds": bounds, "residual": self.residual, "probes": self.probes, "batches": self.batches}


def cross_gram(products: Matrix) -> Matrix:
    """Products of M batches of K + 1 gradients -> (K + 1, K + 1) unbiased Gram matrix of their means.

    Args:
        products: (M, K + 1, M, K + 1), the dot product of gradient i of batch m with gradient j of batch n at [m, i, n, j].
    """
    batches = len(products)
    within = np.einsum("mimj->ij", products)
    gram = (products.sum((0, 2)) - within) / (batches * (batches - 1))
    return (gram + gram.T) / 2


def nonnegative_least_squares(gram: Matrix, linear: Matrix) -> Matrix:
    """lambda >= 0 that minimises `lambda' gram lambda + 2 linear' lambda`: (K, K) positive semidefinite and (K,) -> (K,).

    Lawson and Hanson's active set method (Solving Least Squares Problems, 1974, chapter 23) on the Gram matrix; exact, and finite.
    """
    count = len(linear)
    size = np.sqrt(np.maximum(np.diag(gram), 0.0))
    scale = np.divide(1.0, size, out=np.zeros(count), where=size > 0)  # unit gradients: of unlike units otherwise
    a, b = gram * np.outer(scale, scale), linear * scale
    found, free = np.zeros(count), np.zeros(count, dtype=bool)
    tolerance = 1e-12 * max(1.0, float(np.abs(b).max(initial=0.0)))
    for _ in range(3 * count + 3):
        descent = -(a @ found + b)
        descent[free] = -np.inf
        if not count or descent.max() <= tolerance:
            break
        free[int(descent.argmax())] = True
        while True:
            wanted = np.zeros(count)
            wanted[free] = -np.linalg.lstsq(a[np.ix_(free, free)], b[free], rcond=1e-13)[0]
            blocked = free & (wanted <= 0)
            if not blocked.any():
                found = wanted
                break
            ratio = np.full(count, np.inf)
            ratio[blocked] = found[blocked] / (found[blocked] - wanted[blocked] + 1e-300)
            found = found + ratio.min() * (wanted - found)
            free &= ratio > ratio.min()
            found[~free] = 0.0
    return found * scale


def solve(products: Matrix) -> Solution:
    """Multipliers, their standard errors and the residual, from the products of M >= 3 batches (see `cross_gram`)."""
    batches = len(products)
    gram = cross_gram(products)
    kept = [np.arange(batches) != left_out for left_out in range(batches)]
    copies = [cross_gram(products[keep][:, :, keep]) for keep in kept]
    diagonal = np.diag(gram)
    clear = diagonal > CLEAR * _jackknife(np.array([np.diag(copy) for copy in copies]))
    used = np.flatnonzero(clear[1:]) + 1
    count = len(gram) - 1
    multipliers, stderr = np.full(count, math.nan), np.full(count, math.nan)
    solution = _multipliers(gram, used)
    multipliers[used - 1] = solution
    stderr[used - 1] = _jackknife(np.array([_multipliers(copy, used) for copy in copies]))
    if not clear[0]:
        return Solution(multipliers, stderr, math.nan)
    left = gram[0, 0] + 2 * gram[0, used] @ solution + solution @ gram[np.ix_(used, used)] @ solution
    return Solution(multipliers, stderr, math.sqrt(max(left, 0.0) / gram[0, 0]))


def _multipliers(gram: Matrix, used: NDArray[np.int64]) -> Matrix:
    values, vectors = np.linalg.eigh(gram[np.ix_(used, used)])
    positive = (
        vectors * np.maximum(values, 0.0)
    ) @ vectors.T  # products of different batches need not be a Gram matrix
    return nonnegative_least_squares(positive, gram[used, 0])


def _jackknife(copies: Matrix) -> Matrix:
    """Standard errors from the M leave-one-out values (M, ...)."""
    return np.sqrt((len(copies) - 1) * ((copies - copies.mean(0)) ** 2).mean(0))


def round_step(limit: float, unit: float) -> float:
    """1, 2 or 5 times a power of ten, the nearest to a tenth of the bound; to a tenth of `unit`, the constraint's scale, where it is 0."""
    wanted = 0.1 * (abs(limit) or unit)
    power = 10.0 ** math.floor(math.log10(wanted))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / wanted)))
