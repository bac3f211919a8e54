"""Clipping by norm bounds what a constraint can do; adaptive clipping lets the task step less while a bound is violated."""

import copy
import itertools
import math

import pytest
import torch

import l3ms


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


@pytest.mark.parametrize("clipping", ["separate", "adaptive"])
def test_the_task_steps_less_while_a_bound_is_violated_and_more_again_inside(clipping):
    x = parameter()
    opt = optimizer([x], clipping=clipping, smoothing=0.2)
    task = torch.tensor([0.3, 0.4, 0.0], dtype=torch.float64)
    assert torch.equal(task_step(opt, x, task), 0.02 * task)  # nothing has been observed yet
    restraint = 0.0
    for rewards in [[2.0, 4.0]] * 3 + [[-3.0, -5.0]] * 20 + [[2.0, 4.0]] * 60:
        constraint_step(opt, x, rewards)
        values = opt.metrics()
        distance = (values["constraints/x/estimate"] - 1.0) / (2 * values["constraints/x/stderr"])
        restraint = min(max(restraint + 0.1 * min(max(distance, -1.0), 1.0), 0.0), math.log(10.0))
        share = math.exp(-restraint) if clipping == "adaptive" else 1.0
        assert values.get("l3m/task_share", 1.0) == pytest.approx(share, rel=1e-12)
        torch.testing.assert_close(task_step(opt, x, task), 0.02 * share * task)
    assert share == pytest.approx(0.1 if clipping == "adaptive" else 1.0)
    large = 100 * task  # its own clipping comes on top, where it is the tighter one
    torch.testing.assert_close(task_step(opt, x, large), 0.02 * min(share, 1 / 50.0) * large)


@pytest.mark.parametrize(
    ("bounds", "estimate", "sign"),
    [({"min": 0.0, "max": 4.0}, 2.0, -1), ({"min": 0.0, "max": 4.0}, 5.0, 1), ({"min": 0.0, "max": 4.0}, -1.0, 1), ({"min": 3.0}, 2.0, 1)],
)  # fmt: skip
def test_the_pressure_is_that_of_the_worst_bound(bounds, estimate, sign):
    opt = optimizer([parameter()], clipping="adaptive", constraint=l3ms.Constraint("x", **bounds))
    opt.observe({"x": [estimate - 0.01, estimate + 0.01]})
    assert float(opt.estimates.pressure(opt.estimates.pending)) == sign


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
