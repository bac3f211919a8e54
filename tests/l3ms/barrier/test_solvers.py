"""The methods that the barrier is compared with: on problems whose multipliers are known, and with the machinery they share with it."""

import copy
import types

import pytest
import torch

import l3ms
from l3m_kernels import Bounds, barrier_multiplier, barrier_weights, initial_state, multiplier_weights
from l3ms.barrier.solvers import SOLVERS, as_solver


def optimizer(x, solver, lr=0.02, **bounds):
    constraint = l3ms.Constraint("x", margin=0.0, **(bounds or {"min": 1.0}))
    base = torch.optim.SGD([x], lr=lr)
    return l3ms.L3MOptimizer(base, [constraint], solver=solver, smoothing=1.0, max_grad_norm=100.0)


def iterate(opt, x, steps):
    """min x^2 with the constraint on x; -> the values of x after each iteration."""
    path = []
    for _ in range(steps):
        (x**2).sum().backward()
        opt.step()
        opt.zero_grad()
        opt.barrier_loss({"x": x.sum()}).backward()
        opt.step()
        opt.zero_grad()
        path.append(x.item())
    return path


def parameter(start=3.0):
    return torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))


@pytest.mark.parametrize("solver", [l3ms.DualAscent(rate=0.5), l3ms.AugmentedLagrangian(rate=0.5, penalty=5.0)])
@pytest.mark.parametrize(
    ("bounds", "target", "multiplier"),
    [({"min": 1.0}, 1.0, 2.0), pytest.param({"max": -1.0}, -1.0, 2.0, marks=pytest.mark.slow)],
)
def test_dual_methods_find_the_multiplier(solver, bounds, target, multiplier):
    """min x^2, x >= 1 (or x <= -1): x = +-1 and lambda = 2.

    Half-steps x -> y = x - 2 lr x -> y + lr lambda rest where the observed y is at the bound: x and lambda are larger by 1 / (1 - 2 lr).
    """
    x, lr = parameter(), 0.02
    opt = optimizer(x, solver, lr, **bounds)
    iterate(opt, x, 800)
    assert opt.metrics()["constraints/x/slack"] == pytest.approx(0.0, abs=1e-5)
    assert opt.metrics()["constraints/x/lambda"] == pytest.approx(multiplier / (1 - 2 * lr), rel=1e-5)
    assert x.item() == pytest.approx(target / (1 - 2 * lr), rel=1e-5)


def test_a_slack_bound_has_multiplier_zero():
    x = parameter()
    opt = optimizer(x, "dual_ascent", max=2.0)
    iterate(opt, x, 400)
    assert opt.metrics()["constraints/x/lambda"] == 0.0
    assert x.item() == pytest.approx(0.0, abs=1e-6)


def test_the_quadratic_penalty_damps_dual_ascent():
    def overshoot(solver):
        x = parameter(0.0)
        return max(iterate(optimizer(x, solver), x, 400)) - 1.0

    assert overshoot(l3ms.AugmentedLagrangian(0.5, 5.0)) < 0.5 * overshoot(l3ms.DualAscent(0.5))


@pytest.mark.parametrize(("weight", "target"), [(5.0, 1.0), pytest.param(1.0, 0.5, marks=pytest.mark.slow)])
def test_penalty_is_exact_only_beyond_the_multiplier(weight, target):
    """min x^2 + w max(0, 1 - x): x = 1 for w >= 2, else x = w / 2."""
    x = parameter()
    path = iterate(optimizer(x, l3ms.Penalty(weight), lr=0.002), x, 1500)
    assert sum(path[-100:]) / 100 == pytest.approx(target, abs=0.01)


def test_a_penalty_begins_beyond_the_bound():
    """On the bound itself nothing is violated, nor where nothing has been observed."""
    violation = torch.tensor([-1e-9, 0.0, 1e-9, 2.0, torch.nan], dtype=torch.float64)
    found = l3ms.Penalty(weight=5.0).multipliers(violation, torch.zeros(5, dtype=torch.float64))
    assert found.tolist() == [0.0, 0.0, 5.0, 5.0, 0.0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_sided_bound_from_samples(solver):
    """A categorical policy over {0..4} with a task that wants 0: the mean is brought into [2, 3] and the nearer bound is active."""
    torch.manual_seed(0)
    logits = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    opt = l3ms.L3MOptimizer(
        torch.optim.Adam([logits], lr=0.03), [l3ms.Constraint("mean", min=2.0, max=3.0)], solver=solver, smoothing=0.1
    )
    means = []
    for _ in range(400):
        (-logits.log_softmax(0)[0]).backward()
        opt.step()
        opt.zero_grad()
        sample = torch.multinomial(logits.detach().softmax(0), 64, replacement=True)
        weight = opt.observe({"mean": sample.double()})
        (-(weight * logits.log_softmax(0)[sample]).sum()).backward()
        opt.step()
        opt.zero_grad()
        means.append(float((logits.detach().softmax(0) * torch.arange(5)).sum()))
    mean = sum(means[-100:]) / 100
    assert (
        2.0 - 0.15 < mean < (2.5 if solver == "barrier" else 2.15)
    )  # the barrier, at its noise floor, keeps a slack of mu / lambda


@pytest.mark.parametrize("solver", ["dual_ascent", "augmented_lagrangian"])
def test_memory_is_kept_and_a_skipped_step_does_not_advance_it(solver):
    x = parameter(0.0)
    opt = optimizer(x, solver)
    iterate(opt, x, 20)
    kept = copy.deepcopy(opt.state_dict())
    opt.barrier_loss({"x": x.sum()}).backward()
    assert x.grad is not None
    x.grad.fill_(float("inf"))
    opt.step()
    opt.zero_grad()
    assert opt.skipped_steps == 1
    assert torch.equal(opt.estimates.memory, kept["l3m"]["memory"])

    other = parameter(x.item())
    resumed = optimizer(other, solver)
    resumed.load_state_dict(kept)
    assert iterate(resumed, other, 10) == iterate(opt, x, 10)


def test_micro_batches_of_a_half_step_advance_the_memory_once():
    def run(parts):
        x = parameter(0.0)
        opt = optimizer(x, l3ms.DualAscent(0.5))
        for part in torch.tensor([0.0, 0.5, 1.0, 0.1], dtype=torch.float64).chunk(parts):
            opt.observe({"x": part})
        x.grad = torch.ones_like(x)
        opt.step()
        return opt.estimates.memory

    assert torch.equal(run(1), torch.tensor([0.5 * 0.6], dtype=torch.float64))
    assert torch.equal(run(1), run(2))


def test_the_barrier_is_one_rule_among_others():
    """`multiplier_weights` with the barrier's rule is `barrier_weights`, bit for bit."""
    torch.manual_seed(0)
    rewards = torch.randn(16, 2, dtype=torch.float64)
    bounds = Bounds.of([(0, -1.0, 0.3, 1.0, 0.0, 2.0, 1.0), (1, 1.0, 0.1, 2.0, 0.1, 0.0, 1.0)])
    mu = torch.tensor(0.3, dtype=torch.float64)
    by_rule = multiplier_weights(rewards, initial_state(2), bounds, lambda violation: barrier_multiplier(violation, mu))
    by_op = barrier_weights(rewards, initial_state(2), bounds, mu, backend="reference")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_rule, by_op, strict=True))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: as_solver("adam"), "solver must be one of barrier, dual_ascent"),
        (lambda: as_solver(3), "solver must be one of barrier, dual_ascent"),  # type: ignore[arg-type]
        (lambda: as_solver(types.SimpleNamespace(multipliers=print)), "solver must be one of"),  # type: ignore[arg-type]
        (lambda: as_solver(types.SimpleNamespace(advance=print)), "solver must be one of"),  # type: ignore[arg-type]
        (lambda: l3ms.DualAscent(0.0), "solver: rate must be positive"),
        (lambda: l3ms.AugmentedLagrangian(0.5, float("nan")), "solver: penalty must be positive"),
        (lambda: l3ms.Penalty(-1.0), "solver: weight must be positive"),
    ],
)
def test_bad_solvers(make, says):
    with pytest.raises(ValueError, match=says):
        make()
