"""Clipping by norm bounds what a constraint can do; adaptive clipping lets the task step less while a bound is violated."""

import copy
import itertools
import math

import pytest
import torch

import l3ms
from l3ms.restraint import Restraint


def optimizer(parameters, *, clipping, constraint=None, **options):
    constraint = constraint or l3ms.Constraint("x", max=1.0, margin=0.0)
    base = torch.optim.SGD(parameters, lr=0.02)
    return l3ms.L3MOptimizer(base, [constraint], clipping=clipping, **options)


def task_step(opt, x, gradient):
    before = x.detach().clone()
    x.grad = gradient.clone()
    opt.step()
    opt.zero_grad()
    return before - x.detach()


def constraint_step(opt, x, rewards, gradient=1e-3):
    opt.observe({"x": rewards})
    x.grad = torch.full_like(x, gradient)
    opt.step()
    opt.zero_grad()


def parameter(size=3):
    return torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def follow(violations, noise=0.1):
    """The share after each of a bound's violations."""
    state, shares = Restraint.none(1, torch.device("cpu")), []
    for violation in violations:
        state = state.advance(f64(violation), f64(noise))
        shares.append(state.share.item())
    return shares


def test_a_violation_that_stays_restrains_the_task_to_a_tenth():
    shares = follow([1.0] * 60)
    assert shares[:3] == pytest.approx([math.exp(-0.05 * n) for n in (1, 2, 3)])
    assert shares[-1] == pytest.approx(0.1)


def test_within_noise_it_restrains_by_as_much_less():
    assert follow([0.1])[0] == pytest.approx(math.exp(-0.05 * 0.5))  # half of 2 standard errors


def test_inside_the_bound_the_task_gets_its_share_back():
    shares = follow([1.0] * 20 + [-1.0] * 20)
    assert shares[19] < 0.4
    assert shares[-1] == pytest.approx(1.0)


def test_a_violation_that_shrinks_by_itself_is_left_alone():
    assert min(follow([5.0 - 0.1 * n for n in range(50)])) > 0.9


def test_an_estimate_that_swings_about_its_bound_is_left_alone():
    assert min(follow([math.sin(n / 3) for n in range(300)])) > 0.6


def test_the_most_restrained_bound_counts_and_an_unseen_one_does_not():
    state = Restraint.none(3, torch.device("cpu"))
    for _ in range(10):
        state = state.advance(f64(1.0, -1.0, math.nan), f64(0.1, 0.1, math.inf))
    assert state.share.item() == pytest.approx(math.exp(-0.5))
    assert state.level.tolist() == pytest.approx([0.5, 0.0, 0.0])
    assert Restraint.none(0, torch.device("cpu")).share == 1.0


@pytest.mark.parametrize("clipping", ["separate", "adaptive"])
def test_the_share_multiplies_the_tasks_gradient_before_its_clipping(clipping):
    x = parameter()
    opt = optimizer([x], clipping=clipping)
    task = f64(0.3, 0.4, 0.0)
    assert torch.equal(task_step(opt, x, task), 0.02 * task)
    for _ in range(20):
        constraint_step(opt, x, [2.9, 3.1])
    share = math.exp(-0.05 * 20) if clipping == "adaptive" else 1.0
    assert opt.metrics().get("l3m/task_share", 1.0) == pytest.approx(share)
    torch.testing.assert_close(task_step(opt, x, task), 0.02 * share * task)
    torch.testing.assert_close(task_step(opt, x, 100 * task), 0.02 * min(share, 1 / 50.0) * 100 * task)


def rest(clipping):
    """Where x ends: the task pulls with 0.9, the constraint x <= 1 is seen through noise of three times its gradient.

    lambda = 0.9 would do. Clipped to 1, the constraint's step keeps 1 / sqrt(10) of its gradient: less than the task's pull, whatever
    lambda is.
    """
    x = parameter(2)
    opt = optimizer([x], clipping=clipping, mu=l3ms.ExponentialDecay(1.0, 0.3, steps=50), smoothing=0.2)
    path = []
    for noise in itertools.islice(itertools.cycle([3.0, -3.0]), 500):
        (-0.9 * x[0]).backward()
        opt.step()
        opt.zero_grad()
        opt.barrier_loss({"x": x[0] + noise * (x[1] - x[1].detach())}).backward()
        opt.step()
        opt.zero_grad()
        path.append(x[0].item())
    return sum(path[-100:]) / 100


def test_a_bound_that_separate_clipping_cannot_hold():
    assert rest("separate") > 4.0  # drifts away
    assert rest("adaptive") < 1.1


def test_the_share_is_kept_and_a_skipped_step_leaves_it():
    x = parameter()
    opt = optimizer([x], clipping="adaptive")
    constraint_step(opt, x, [2.0, 4.0])
    share = opt.metrics()["l3m/task_share"]
    assert share < 1.0
    constraint_step(opt, x, [2.0, 4.0], math.inf)
    assert opt.skipped_steps == 1
    assert opt.metrics()["l3m/task_share"] == share
    other = optimizer([x], clipping="adaptive")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.metrics()["l3m/task_share"] == share


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="clipping must be one of adaptive, separate, got 'none'"):
        optimizer([parameter(1)], clipping="none")
