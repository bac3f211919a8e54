"""mu over a run: the paper's decay, and the decay that stops at the noise of the estimates."""

import itertools
import math

import pytest
import torch

import l3ms
from l3m_kernels import barrier_multiplier
from l3ms.barrier.schedules import as_schedule, noise_floor

QUIET = torch.tensor(0.0, dtype=torch.float64)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def test_the_papers_decay_from_1_to_1e_minus_6():
    schedule = l3ms.ExponentialDecay(1.0, 1e-6, steps=600)
    for step, mu in [(0, 1.0), (100, 1e-1), (300, 1e-3), (600, 1e-6), (5000, 1e-6)]:
        value = schedule(torch.tensor(step), f64(0.5), QUIET)
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(mu, rel=1e-13)
    noisy = schedule(torch.tensor(300), f64(0.5), f64(100.0))
    assert noisy.item() == pytest.approx(1e-3, rel=1e-13)  # the paper's does not look at the noise


def test_auto_without_noise_is_the_papers_decay():
    paper, auto = l3ms.ExponentialDecay(1.0, 1e-4, steps=50), l3ms.NoiseFloorDecay(1.0, 1e-4, steps=50)
    mu = f64(1.0)
    for step in range(1, 80):
        mu = auto(torch.tensor(step), mu, QUIET)
        assert mu.item() == pytest.approx(paper(torch.tensor(step), mu, QUIET).item(), rel=1e-12)


def test_auto_ends_at_the_noise_floor_rises_with_it_and_resumes():
    schedule = l3ms.NoiseFloorDecay(1.0, 1e-6, steps=60)
    fastest = 10 ** (-6 / 60)
    mu, steps, seen = f64(1.0), 0, [1.0]

    def advance(count, noise):
        nonlocal mu, steps
        for _ in range(count):
            steps += 1
            mu = schedule(torch.tensor(steps), mu, f64(noise))
            seen.append(mu.item())

    floor = 0.01 ** (1 / 3)
    assert noise_floor(f64(0.005)).item() == pytest.approx(floor, rel=1e-14)
    advance(30, 0.005)
    assert mu.item() == pytest.approx(floor**0.5, rel=1e-12)  # half of the way, in equal factors
    advance(30, 0.005)
    assert mu.item() == pytest.approx(floor, rel=1e-12)
    advance(2, 0.5)  # the noise grows, and mu with it, no faster than it may fall
    assert mu.item() == pytest.approx(floor / fastest**2, rel=1e-12)
    advance(20, 0.005)
    assert mu.item() == pytest.approx(floor, rel=1e-12)
    advance(3, 1e-9)  # the noise falls: it goes on from where it stood, no faster than the paper's
    assert mu.item() == pytest.approx(floor * fastest**3, rel=1e-12)
    advance(200, 0.0)
    assert mu.item() == pytest.approx(1e-6, rel=1e-12)
    advance(200, 1e9)
    assert mu.item() == pytest.approx(1.0, rel=1e-12)  # never above where it began
    assert all(
        fastest * (1 - 1e-9) <= after / before <= (1 + 1e-9) / fastest for before, after in itertools.pairwise(seen)
    )


def test_noise_floor_is_where_a_standard_error_moves_the_multiplier_by_a_half():
    noise = f64(0.03)
    mu = noise_floor(noise)
    at, beyond = (barrier_multiplier(z, mu) for z in (f64(0.01), 0.01 + noise))
    assert (beyond - at).item() == pytest.approx(0.5, rel=1e-12)


def test_unknown_noise_holds_mu():
    assert l3ms.NoiseFloorDecay(1.0, 1e-6, 10)(torch.tensor(1), f64(0.3), f64(math.inf)).item() == 0.3


@pytest.mark.parametrize("kind", [l3ms.ExponentialDecay, l3ms.NoiseFloorDecay])
@pytest.mark.parametrize(
    "arguments", [(1.0, 0.0, 5), (1.0, 2.0, 5), (math.inf, 1.0, 5), (math.nan, 1.0, 5), (1.0, 1e-3, 0), (1.0, -1.0, 5)]
)
def test_a_bad_schedule_is_refused(kind, arguments):
    with pytest.raises(ValueError, match="mu: "):
        kind(*arguments)


def test_names_of_schedules():
    assert isinstance(as_schedule("auto"), l3ms.NoiseFloorDecay)
    assert type(as_schedule("paper")) is l3ms.ExponentialDecay
    assert as_schedule("paper").end == 1e-6
    with pytest.raises(ValueError, match='"auto", "paper" or a schedule'):
        as_schedule("fast")


@pytest.mark.parametrize(
    ("bound", "scale", "end", "accepted"),
    [
        (1.0, None, 3.1e-8, True),  # s = mu^2 of 4 ulp of 1 = 8.9e-16
        (1.0, None, 2.9e-8, False),
        (1e6, 1.0, 2e-5, False),
        (1e6, 1.0, 3e-5, True),
        (1e6, None, 3.1e-8, True),  # 1 in units of 1e6
    ],
)
def test_a_mu_below_the_resolution_of_a_bound_is_refused(bound, scale, end, accepted):
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    constraint = l3ms.Constraint("r", max=bound, scale=scale)
    schedule = l3ms.ExponentialDecay(1.0, end, 10)
    if accepted:
        assert l3ms.L3MOptimizer(base, [constraint], mu=schedule).mu.item() == 1.0
    else:
        with pytest.raises(ValueError, match=r"mu: its end .* is too small for constraint 'r'"):
            l3ms.L3MOptimizer(base, [constraint], mu=schedule)


def test_mu_of_the_optimizer_follows_the_schedule_on_constraint_steps_only():
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=0.01), [l3ms.Constraint("x", max=9.0)], mu=l3ms.ExponentialDecay(1.0, 1e-2, steps=4)
    )
    seen = []
    for _ in range(6):
        (x**2).sum().backward()
        opt.step()
        opt.zero_grad()
        opt.barrier_loss({"x": x}).backward()
        opt.step()
        opt.zero_grad()
        seen.append(opt.metrics()["l3m/mu"])
    assert seen == pytest.approx([10**-0.5, 1e-1, 10**-1.5, 1e-2, 1e-2, 1e-2], rel=1e-13)
    assert opt.constraint_steps == 6


def test_auto_stops_at_the_noise_of_the_estimates_and_says_which(caplog):
    """Rewards of standard deviation 10 around 40: the floor is (2 stderr / scale)^(1/3) of the noisier constraint."""
    x = torch.nn.Parameter(torch.zeros(4))
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=0.0),
        [l3ms.Constraint("quiet", max=9.0), l3ms.Constraint("noisy", max=50.0)],
        mu=l3ms.NoiseFloorDecay(1.0, 1e-6, steps=20),
    )
    generator = torch.Generator().manual_seed(0)
    with caplog.at_level("INFO", logger="l3ms"):
        for _ in range(25):
            noisy = 40 + 10 * torch.randn(32, generator=generator)
            weights = opt.observe({"quiet": [1.0] * 32, "noisy": noisy})
            (weights.sum() * 0 + x.sum()).backward()
            opt.step()
            opt.zero_grad()
    values = opt.metrics()
    floor = (2 * values["constraints/noisy/stderr"] / 50.0) ** (1 / 3)
    assert values["l3m/mu"] == pytest.approx(floor, rel=0.15)
    assert values["l3m/mu"] >= floor
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) >= 1
    assert all("mu waits at" in message and "'noisy'" in message for message in messages)
