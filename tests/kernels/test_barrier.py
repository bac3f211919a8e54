"""The relaxed logarithmic barrier, its slope and its curvature against 50-digit arithmetic."""

import math
import random

import pytest
import torch
from mpmath import log, mpf, workdps

from l3m_kernels import barrier_multiplier, reference, relaxed_log_barrier
from l3m_kernels.barrier import _barrier_curvature, _barrier_multiplier, _relaxed_log_barrier

nan, infinity = float("nan"), float("inf")
FUNCTIONS = [relaxed_log_barrier, barrier_multiplier]


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_mu(draw: random.Random) -> float:
    return draw.choice(
        (1.0, 0.1, 1e-6, 1e-7, 10 ** draw.uniform(-7, 0), 10 ** draw.uniform(-7, 0), draw.uniform(1e-7, 1))
    )


def random_z(draw: random.Random, s: float) -> float:
    """All sizes up to 1e6, and the places where the formula changes or cancels: -s, -2s, 0, -1."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice((-1, 1)) * 10 ** draw.uniform(-20, 6)
    if kind == 1:
        return -s * (1 + draw.choice((-1, 0, 1)) * 10 ** draw.uniform(-17, 0))
    if kind == 2:
        return draw.uniform(-4, 4) * s
    if kind == 3:
        return draw.choice((-s, -2 * s, 0.0, -1.0, s, -1e6, 1e6))
    return draw.uniform(-2, 2)


def exact(z: float, mu: float) -> tuple:
    """Value, slope and curvature (mpf) with s = mu^2, to 50 digits."""
    z_, mu_ = mpf(z), mpf(mu)
    s = mu_ * mu_
    if -z_ >= s:
        return -mu_ * log(-z_), -mu_ / z_, mu_ / (z_ * z_)
    ratio = (z_ + 2 * s) / s
    return mu_ / 2 * (ratio**2 - 1) - mu_ * log(s), mu_ / s * ratio, mu_ / (s * s)


def error_in_ulps(found: float, wanted, size: float = 0.0) -> float:
    return float(abs(mpf(found) - wanted)) / math.ulp(max(abs(float(wanted)), size))


def check_points(seed: int, points: int) -> None:
    draw = random.Random(seed)
    mu = random_mu(draw)
    z = float64(*(random_z(draw, mu * mu) for _ in range(points)))
    values, slopes = relaxed_log_barrier(z, mu), barrier_multiplier(z, mu)
    curvatures = reference.barrier_curvature(z, *float64(mu, mu * mu))
    with workdps(50):
        for at, value, slope, curvature in zip(*(t.tolist() for t in (z, values, slopes, curvatures)), strict=True):
            wanted = exact(at, mu)
            where = f"z = {at!r}, mu = {mu!r}"
            assert error_in_ulps(slope, wanted[1]) <= 4, where
            assert error_in_ulps(curvature, wanted[2]) <= 4, where
            # The square doubles the ratio's error; around 0 the value is a difference of two terms of mu's size.
            assert error_in_ulps(value, wanted[0], size=mu) <= 8, where


@pytest.mark.parametrize("seed", range(60))
def test_against_mpmath(seed):
    check_points(seed, 100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_million_points_against_mpmath(seed):
    for part in range(100):
        check_points(1000 * seed + part, 100)


def test_nothing_overflows():
    """z in [-1e6, 1e6], mu in [1e-7, 1]: a million points, with the ends and the smallest numbers."""
    sizes = torch.cat([float64(0.0, 5e-324, 1e-308), torch.logspace(-20, 6, 5000, dtype=torch.float64)])
    z = torch.cat([-sizes, sizes, torch.linspace(-1, 1, 1001, dtype=torch.float64)])
    for mu in torch.logspace(-7, 0, 100, dtype=torch.float64):
        s = mu * mu
        near = torch.cat([z, z * s, -s * (1 + z)])
        for function in (*FUNCTIONS, reference.barrier_curvature):
            arguments = (near, mu) if function in FUNCTIONS else (near, mu, s)
            assert bool(function(*arguments).isfinite().all()), (function, mu)
        assert bool((barrier_multiplier(near, mu) > 0).logical_or(near < -2 * s).logical_or(near == -2 * s).all())


@pytest.mark.parametrize("mu", [1.0, 0.3, 0.1, 1e-3, 1e-6, 1e-7])
@pytest.mark.parametrize("s", [None, 0.25, 1e-5])
def test_value_slope_and_curvature_are_continuous_where_the_pieces_meet(mu, s):
    s_ = mu * mu if s is None else s
    inside, beyond = float64(math.nextafter(-s_, -infinity), math.nextafter(-s_, infinity))
    tolerance = {"rtol": 4 * 2**-52, "atol": 4 * 2**-52 * mu}
    torch.testing.assert_close(relaxed_log_barrier(inside, mu, s), relaxed_log_barrier(beyond, mu, s), **tolerance)
    torch.testing.assert_close(barrier_multiplier(inside, mu, s), barrier_multiplier(beyond, mu, s), **tolerance)
    curvature = [reference.barrier_curvature(z, *float64(mu, s_)) for z in (inside, beyond)]
    torch.testing.assert_close(*curvature, **tolerance)
    assert barrier_multiplier(-s_, mu, s) == pytest.approx(mu / s_, rel=1e-15)
    assert barrier_multiplier(0.0, mu, s) == pytest.approx(2 * mu / s_, rel=1e-15)


@pytest.mark.parametrize("mu", [1.0, 0.1, 1e-4])
def test_convex(mu):
    """The slope never falls, up to rounding."""
    s = mu * mu
    z = torch.cat(
        [torch.linspace(-2, 2, 4001, dtype=torch.float64), torch.linspace(-3 * s, s, 4001, dtype=torch.float64)]
    )
    slope = barrier_multiplier(z.sort().values, mu)
    assert bool((slope.diff() >= -4 * 2**-52 * slope[1:]).all())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_and_infinity(function):
    z = float64(nan, -infinity, infinity, -0.5)
    result = function(z, 0.1)
    assert result.isnan().tolist() == [True, False, False, False]
    assert result[1] == (0.0 if function is barrier_multiplier else -infinity)
    assert result[2] == infinity


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": 0.0}, "mu must be positive and finite, got 0.0"),
        ({"mu": -0.1}, "mu must be positive and finite, got -0.1"),
        ({"mu": nan}, "mu must be positive and finite, got nan"),
        ({"mu": infinity}, "mu must be positive and finite, got inf"),
        ({"mu": float64(0.0)[0]}, "mu must be positive"),
        ({"mu": 1e-170}, "s must be positive and finite, got 0.0"),
        ({"s": 0.0}, "s must be positive and finite, got 0.0"),
        ({"s": -1.0}, "s must be positive"),
        ({"s": nan}, "s must be positive"),
        ({"mu": float64(0.1, 0.2)}, r"mu must be a 0-dim constant, got shape \(2,\)"),
        ({"s": float64(0.1)}, r"s must be a 0-dim constant, got shape \(1,\)"),
        (
            {"mu": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)},
            "mu must be a 0-dim constant.*requires_grad",
        ),
    ],
)
def test_wrong_mu_or_s_is_named(function, change, message):
    arguments = {"z": -0.5, "mu": 0.1} | change
    with pytest.raises(ValueError, match=f"^{function.__name__}: {message}"):
        function(**arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numbers_and_tensors(function):
    """float64 comes out, whatever came in; mu may be a number or a tensor."""
    z, mu = -0.37, 0.01
    wanted = function(float64(z), float64(mu)[0])
    for result in (function(z, mu), function(z, mu, mu * mu), function(float64(z).view(1, 1), mu)):
        assert result.dtype == torch.float64
        assert torch.equal(result.reshape(1), wanted)
    single = torch.tensor([z], requires_grad=True)
    result = function(single, mu)
    assert result.dtype == torch.float64
    result.sum().backward()
    assert single.grad is not None
    assert single.grad.dtype == torch.float32
    assert function(torch.zeros(0, 3), mu).shape == (0, 3)


# ---- derivatives and torch.library


POINTS = float64(-3.0, -0.5, -0.1, -0.0905, -0.0895, -0.05, 0.0, 0.7)  # around -s = -0.09


def test_gradcheck():
    z = POINTS.clone().requires_grad_()
    for function in FUNCTIONS:
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, 0.3), z, eps=1e-7)
    assert torch.autograd.gradgradcheck(lambda z: relaxed_log_barrier(z, 0.3), z, eps=1e-7)


@pytest.mark.parametrize("s", [None, 0.2])
def test_derivatives_are_the_ops(s):
    z = POINTS.clone().requires_grad_()
    s_ = 0.3 * 0.3 if s is None else s
    (slope,) = torch.autograd.grad(relaxed_log_barrier(z, 0.3, s).sum(), z, create_graph=True)
    assert torch.equal(slope, barrier_multiplier(z, 0.3, s))
    (curvature,) = torch.autograd.grad(slope.sum(), z, create_graph=True)
    assert torch.equal(curvature, reference.barrier_curvature(z, *float64(0.3, s_)))
    with pytest.raises(RuntimeError, match=r"barrier_curvature: .* a third is not supported"):
        torch.autograd.grad(curvature.sum(), z)


OPS = [_relaxed_log_barrier, _barrier_multiplier, _barrier_curvature]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    generator = torch.Generator().manual_seed(0)
    for mu in (1.0, 0.2, 1e-6):
        for shape in ((), (0,), (1,), (5,), (3, 4), (2, 0, 3)):
            z = torch.randn(shape, dtype=torch.float64, generator=generator)
            differentiable = z.clone().requires_grad_(op is not _barrier_curvature)
            for values in (z, z.mT if z.ndim > 1 else z, z[:1].expand(shape) if z.numel() > 1 else z, differentiable):
                torch.library.opcheck(
                    op,
                    (values, *float64(mu, mu * mu)),
                    test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
                )
        points = float64(-0.5, 0.1).requires_grad_(op is not _barrier_curvature)
        torch.library.opcheck(op, (points, *float64(mu, mu * mu)))
