"""Random runs of `barrier_weights`, and the same computed from their history in loops over Python floats.

Letters: N responses, R rewards, K one-sided constraints. Nothing here is recursive or vectorised: a moving average is the weighted mean
over all batches so far, a baseline is the mean of the other responses.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from l3m_kernels import Bounds

nan = float("nan")
Batch = list[list[float]]  # N rows of R rewards, NaN where missing
BoundRow = tuple[int, float, float, float, float, float, float]


@dataclass(frozen=True)
class Run:
    batches: list[Batch]  # the steps of a run, the last one is looked at
    bounds: list[BoundRow]  # reward, sign, bound, scale, margin, margin_stderrs, margin_max
    norm: list[float]  # of the last batch
    mu: float
    smoothing: float
    leave_one_out: bool

    @classmethod
    def random(cls, seed: int) -> "Run":
        draw = random.Random(seed)
        rewards, missing = draw.randint(1, 3), draw.choice((0.0, 0.0, 0.3, 0.8))
        centre = [draw.choice((0.0, 0.5, -3.0, 40.0)) for _ in range(rewards)]
        spread = [draw.choice((0.0, 0.1, 1.0, 12.0)) for _ in range(rewards)]

        def batch() -> Batch:
            rows = draw.choice((1, 1, 2, 3, 8, 12))
            return [
                [nan if draw.random() < missing else draw.gauss(centre[r], spread[r]) for r in range(rewards)]
                for _ in range(rows)
            ]

        def bound() -> BoundRow:
            r = draw.randrange(rewards)
            sign, scale = draw.choice((-1.0, 1.0)), draw.choice((1.0, 0.2, 14.0))
            margin_max = draw.choice((math.inf, 0.05, 1.0))
            return (
                r,
                sign,
                centre[r] + draw.gauss(0, 1),
                scale,
                draw.choice((0.0, 0.3)),
                draw.choice((0.0, 2.0)),
                margin_max,
            )

        batches = [batch() for _ in range(draw.choice((1, 1, 2, 5)))]
        return cls(
            batches=batches,
            bounds=[bound() for _ in range(draw.randint(0, 4))],
            norm=[float(draw.randint(1, 50)) for _ in batches[-1]],
            mu=draw.choice((1.0, 0.3, 0.1, 1e-3, 1e-6)),
            smoothing=draw.choice((0.1, 0.1, 0.013, 0.5, 1.0)),
            leave_one_out=draw.random() < 0.8,
        )

    def tensors(self, step: int = -1) -> Tensor:
        return torch.tensor(self.batches[step], dtype=torch.float64)

    @property
    def table(self) -> Bounds:
        return Bounds.of(self.bounds)


def column(*values: float) -> Tensor:
    """(N, 1) float64, one reward of N responses."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def present(batch: Batch, reward: int) -> list[float]:
    return [row[reward] for row in batch if not math.isnan(row[reward])]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def average(run: Run, reward: int) -> tuple[float, float]:
    """-> estimate and its standard error after the last batch; (0, inf) if the reward was never seen."""
    batches = [values for values in (present(batch, reward) for batch in run.batches) if values]
    keep = 1 - run.smoothing

    def weighted(count: int, values: list[float]) -> float:
        """sum over the first `count` batches, the newest with weight `smoothing`, the one before with smoothing * keep ..."""
        return math.fsum(run.smoothing * keep ** (count - 1 - i) * values[i] for i in range(count))

    def estimate(count: int) -> float:
        return weighted(count, [mean(values) for values in batches]) / weighted(count, [1.0] * len(batches))

    if not batches:
        return 0.0, math.inf
    squares, freedom = [], []
    for i, values in enumerate(batches):
        if len(values) > 1:
            squares.append(math.fsum((value - mean(values)) ** 2 for value in values))
            freedom.append(len(values) - 1.0)
        elif i > 0:  # a batch of one: its distance from the average so far, as in Welford's recurrence
            rate = run.smoothing / weighted(i + 1, [1.0] * (i + 1))
            squares.append((values[0] - estimate(i)) ** 2 * (1 - rate))
            freedom.append(1.0)
        else:
            squares.append(0.0)
            freedom.append(0.0)
    count, total = len(batches), weighted(len(batches), [1.0] * len(batches))
    if not weighted(count, freedom) > 0:
        return estimate(count), math.inf
    variance = weighted(count, squares) / weighted(count, freedom)
    noise = math.fsum((run.smoothing * keep ** (count - 1 - i)) ** 2 / len(batches[i]) for i in range(count))
    return estimate(count), math.sqrt(variance * noise) / total


def violation(row: BoundRow, estimate: float, error: float) -> float:
    _, sign, bound, scale, margin, margin_stderrs, margin_max = row
    known = 0.0 if math.isinf(error) else error
    return (sign * (estimate - bound) + min(margin + margin_stderrs * known, margin_max)) / scale


def multiplier(z: float, mu: float) -> float:
    s = mu * mu
    return mu / -z if -z >= s else mu / s * ((z + 2 * s) / s)


def seq_weights(run: Run, multipliers: list[float], estimates: list[float]) -> list[float]:
    """sum_k (lambda_k / S) (b_k - c_k(y_n)) / (n norm_n) with c_k = sign (r - bound) / scale + margin, and b_k over the others."""
    share = max(1.0, math.fsum(multipliers))
    batch, weights = run.batches[-1], []
    for n, row in enumerate(batch):
        terms = []
        for (reward, sign, _, scale, *_), lambda_ in zip(run.bounds, multipliers, strict=True):
            seen = present(batch, reward)
            others = [r[reward] for m, r in enumerate(batch) if m != n and not math.isnan(r[reward])]
            if math.isnan(row[reward]) or (run.leave_one_out and not others):
                continue
            baseline = mean(others) if run.leave_one_out else estimates[reward]
            constant = all(value == seen[0] for value in seen) and abs(row[reward] - baseline) < 1e-12 * abs(baseline)
            if not constant:
                terms.append(lambda_ / share * sign / scale * (baseline - row[reward]) / len(seen))
        weights.append(math.fsum(terms) / run.norm[n])
    return weights
