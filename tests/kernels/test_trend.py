"""The filter of level and trend against itself in matrices and native units, and what it promises of moving means."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from barrier_problems import bits
from head_cases import backends_of

from l3m_kernels import Bounds, barrier_weights, initial_state, trend, unobserved

BOUND = Bounds.of([(0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)])
SIZE = 8  # of the batches, where some are left out
backends = pytest.mark.parametrize("backend", backends_of("barrier_weights"))


def followed(batches, backend=None):
    """Estimates and standard errors, batch after batch: lists of rewards, or of nothing."""
    state, found = initial_state(1, smoothing="trend"), []
    for batch in batches:
        if batch is None:  # time passes, and nothing is observed
            state = unobserved(state, torch.tensor([float(SIZE)], dtype=torch.float64))
        rewards = torch.tensor(batch or [], dtype=torch.float64).reshape(-1, 1)
        out = barrier_weights(rewards, state, BOUND, 0.1, smoothing="trend", backend=backend)
        state = out.state
        found.append((float(out.estimate[0]), float(out.stderr[0])))
    return found


def by_matrices(batches):
    """The same, as textbooks write it: an interacting-multiple-model filter with 2 x 2 covariances, in native units."""
    step, change, seen = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array(trend.CHANGE), []
    squares = dof = 0.0
    models = None
    for batch in batches:
        n, mean = (SIZE, math.nan) if batch is None else (len(batch), math.fsum(batch) / len(batch))
        if models is None:
            assert batch is not None
            squares, dof = trend.POOLING * math.fsum((x - mean) ** 2 for x in batch), trend.POOLING * (n - 1)
            unit = 1.0 / n  # covariances in units of the variance within a batch, which is known better and better
            models = [
                (p, np.array([mean, 0.0]), np.diag([unit, first * unit]))
                for p, first in zip(trend.PRIOR, trend.TREND_PRIOR, strict=True)
            ]
            estimate, spread = mean, unit
        else:
            variance, foretold = squares / dof, []
            for to in range(3):
                flow = np.array([change[i, to] * models[i][0] for i in range(3)])
                share = flow / flow.sum()
                x = sum(s * m[1] for s, m in zip(share, models, strict=True))
                P = sum(
                    s * (m[2] + np.outer(m[1] - x, m[1] - x) / variance) for s, m in zip(share, models, strict=True)
                )
                if to == 0:
                    x, P = x * [1, 0], P * [[1, 0], [0, 0]]
                noise = np.diag([trend.LEVEL_NOISE[to], trend.TREND_NOISE[to]]) / n
                foretold.append((flow.sum(), step @ x, step @ P @ step.T + noise))
            if batch is None:
                models = foretold
                estimate = sum(p * x[0] for p, x, _ in models)
                spread = sum(p * (P[0, 0] + (x[0] - estimate) ** 2 / variance) for p, x, P in models)
                seen.append((estimate, math.sqrt(variance * spread)))
                continue
            within, freedom = math.fsum((x - mean) ** 2 for x in batch), n - 1.0
            if n == 1:
                within, freedom = sum(p * (mean - x[0]) ** 2 / (P[0, 0] + 1.0) for p, x, P in foretold), 1.0
            squares = (1 - trend.POOLING) * squares + trend.POOLING * within
            dof = (1 - trend.POOLING) * dof + trend.POOLING * freedom
            variance, models = squares / dof, []
            for p, x, P in foretold:
                S, e = P[0, 0] + 1.0 / n, mean - x[0]
                K = P[:, 0] / S
                nu = trend.FREEDOM  # Student's t, but for constants
                density = S**-0.5 * (1 + e * e / (nu * S * variance)) ** (-(nu + 1) / 2)
                models.append((p * density, x + K * e, P - np.outer(K, P[0])))
            total = sum(p for p, *_ in models)
            models = [(p / total, x, P) for p, x, P in models]
            estimate = sum(p * x[0] for p, x, _ in models)
            spread = sum(p * (P[0, 0] + (x[0] - estimate) ** 2 / variance) for p, x, P in models)
        seen.append((estimate, math.sqrt(squares / dof * spread) if dof > 0 else math.inf))
    return seen


@backends
@pytest.mark.parametrize("seed", range(12))
def test_the_textbook_filter(seed, backend):
    draw = np.random.default_rng(seed)
    level, speed, sizes = draw.normal(0, 30), draw.choice([0.0, 0.3, 2.0]), draw.choice([1, 2, 8, 40], 25)
    sizes[0] = max(sizes[0], 2)
    batches = [draw.normal(level + speed * i * (i > 8), 5.0, n).tolist() for i, n in enumerate(sizes)]
    np.testing.assert_allclose(followed(batches, backend), by_matrices(batches), rtol=1e-9)


@backends
@pytest.mark.parametrize("seed", range(6))
def test_the_textbook_filter_where_batches_are_left_out(seed, backend):
    draw = np.random.default_rng(seed)
    level, speed = draw.normal(0, 30), draw.choice([0.0, 0.3, 2.0])
    batches = [
        draw.normal(level + speed * i, 5.0, SIZE).tolist() if i in (0, 1, 2, 3, 7, 8, 13) else None for i in range(17)
    ]
    found = followed(batches, backend)
    np.testing.assert_allclose(found, by_matrices(batches), rtol=1e-9)
    bands = [error for _, error in found]
    assert all(
        before < after for before, after, batch in zip(bands, bands[1:], batches[1:], strict=False) if batch is None
    )


def test_time_that_passes_moves_a_level_along_its_trend_and_nothing_before_the_first_batch():
    count = torch.tensor([8.0], dtype=torch.float64)
    empty = initial_state(1, smoothing="trend")
    assert torch.equal(unobserved(empty, count), empty)
    found = followed([[float(i)] * 7 + [i + 1.0] for i in range(40)] + [None] * 3)
    assert np.diff([estimate for estimate, _ in found[-4:]]) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match=r'state must be \(1, 23\) float64 \(of smoothing="trend"\), got \(1, 5\)'):
        unobserved(initial_state(1), count)


@backends
def test_first_estimate_is_the_first_batch_mean(backend):
    assert followed([[2.0, 4.0, 9.0]], backend)[0][0] == 5.0
    assert followed([[7.0]], backend) == [(7.0, math.inf)]


@backends
@pytest.mark.parametrize("value", [0.1, -1e9, 0.0, 3.0])
def test_a_constant_reward_stays_what_it_is(value, backend):
    for estimate, error in followed([[value] * 8] * 50, backend):
        assert estimate == pytest.approx(value, rel=1e-15)
        assert error <= 1e-7 * abs(value)


@backends
@pytest.mark.parametrize("batches", [
    [[5.0] * 4] * 3 + [[float(i * i)] * 4 for i in range(30)],  # no spread, and it moves
    [[float(i)] for i in range(40)],  # one response a step
    [[0.0, 1e-300], [1e9, 2e9], [0.0, 0.0], [1e-9, 0.0]],
    [[0.0] * 1000, [1e12] * 1000, [0.0] * 1000],
])  # fmt: skip
def test_finite_whatever_the_batches(batches, backend):
    found = followed(batches, backend)[1:]
    assert all(math.isfinite(estimate) and math.isfinite(error) for estimate, error in found)
    assert found[-1][0] == pytest.approx(sum(batches[-1]) / len(batches[-1]), rel=0.2, abs=2e9)


@backends
def test_a_batch_without_a_sample_changes_nothing(backend):
    state = initial_state(1, smoothing="trend")
    for batch in ([3.0, 5.0], [4.0, 7.0]):
        state = barrier_weights(torch.tensor(batch).double()[:, None], state, BOUND, 0.1, smoothing="trend").state
    out = barrier_weights(torch.full((4, 1), torch.nan).double(), state, BOUND, 0.1, smoothing="trend", backend=backend)
    assert torch.equal(bits(out.state), bits(state))


@backends
def test_units_do_not_matter(backend):
    draw = np.random.default_rng(3)
    batches = [draw.normal(40 - i, 6, 8) for i in range(30)]
    seconds = followed([(b * 4096).tolist() for b in batches], backend)  # a power of two: the same bits
    assert seconds == [(4096 * e, 4096 * s) for e, s in followed([b.tolist() for b in batches], backend)]


def simulated(path, repetitions=400, n=8, sd=1.0, smoothing: Any = "trend", seed=0):
    """Errors of the estimates and their standard errors, (steps, repetitions), of policies whose mean follows `path`."""
    generator = torch.Generator().manual_seed(seed)
    state, errors, bands = initial_state(repetitions, smoothing=smoothing), [], []
    bounds = Bounds.of([(0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)])
    for mean in path:
        rewards = mean + sd * torch.randn(n, repetitions, dtype=torch.float64, generator=generator)
        out = barrier_weights(rewards, state, bounds, 0.1, smoothing=smoothing)
        state = out.state
        errors.append(out.estimate - mean)
        bands.append(out.stderr)
    return torch.stack(errors), torch.stack(bands)


NOISE = 1.0 / math.sqrt(8)  # of a batch mean


@pytest.mark.parametrize("speed", [0.1, 0.2, 0.5, 1.0, 2.0])
def test_the_band_covers_a_mean_that_moves(speed):
    """Nine steps in ten of a way at a known speed, in standard errors of a batch a step; the moving average's band, hardly one."""
    path = [speed * NOISE * step for step in range(60)]
    errors, bands = simulated(path)
    assert (errors.abs() <= 1.96 * bands)[2:].double().mean() >= 0.9
    errors, bands = simulated(path, smoothing=0.1)
    assert (errors.abs() <= 1.96 * bands)[2:].double().mean() < 0.35


def test_at_rest_the_band_is_no_wider_than_the_moving_averages():
    errors, bands = simulated([3.0] * 120)
    _, before = simulated([3.0] * 120, smoothing=0.1)
    assert bands[60:].mean() <= before[60:].mean()
    assert bands[2:].mean() <= 1.1 * before[2:].mean()  # it has to find out first that the policy rests
    assert (errors.abs() <= 1.96 * bands).double().mean() >= 0.95


def test_a_mean_that_stops_is_not_overshot_for_long():
    path = [0.5 * NOISE * min(step, 30) for step in range(70)]
    errors, bands = simulated(path)
    assert (errors.abs() <= 1.96 * bands)[30:].double().mean() >= 0.9
    assert errors[40:].square().mean().sqrt() < 0.45 * NOISE
    assert all(late <= early * 1.02 for early, late in pairwise(bands[45:].mean(1)[::5].tolist()))
