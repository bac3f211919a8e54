"""`L3MOptimizer` on problems whose solution and multipliers are known, in float64: the promise itself."""

import logging
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import l3ms
from l3ms.barrier.conflicts import ConflictWatch


def solve(opt, x, task, values, steps, settle, lr):
    """`steps` iterations in which the learning rate falls from 0.1 to lr, `settle` more at lr."""
    schedule = LambdaLR(opt, lambda n: 0.1 * (lr / 0.1) ** min(n / steps, 1.0))
    for _ in range(steps + settle):
        task(x).backward()
        opt.step()
        opt.zero_grad()
        opt.barrier_loss(values(x)).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    return opt.metrics()


def parameter(*start):
    return torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))


@pytest.mark.parametrize(("mu", "lr", "steps"), [(0.1, 1e-2, 60), (1e-2, 1e-3, 120), (1e-4, 1e-5, 200)])
def test_one_constraint(mu, lr, steps):
    """min x^2, x >= 1: x = (1 + sqrt(1 + 2 mu)) / 2, lambda = 2x -> 2 as mu -> 0.

    Alternating half-steps x -> y = x - 2 lr x -> y + lr lambda(y) rest where 2x = lambda(y) = mu / (y - 1): y is the solution for
    mu (1 - 2 lr), exactly.
    """
    x = parameter(3.0)
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=1.0),
        [l3ms.Constraint("x", min=1.0, margin=0.0)],
        mu=l3ms.ExponentialDecay(1.0, mu, steps=steps),
        smoothing=1.0,
        max_grad_norm=10.0,
    )
    values = solve(opt, x, lambda x: (x**2).sum(), lambda x: {"x": x.sum()}, steps, 60, lr)
    resting = (1 + math.sqrt(1 + 2 * mu * (1 - 2 * lr))) / 2
    assert values["constraints/x/estimate"] == pytest.approx(resting, rel=1e-9)
    assert values["constraints/x/lambda"] == pytest.approx(2 * x.item(), rel=1e-8)  # stationarity
    assert values["constraints/x/lambda"] * values["constraints/x/slack"] == pytest.approx(mu, rel=1e-9)
    assert x.item() == pytest.approx((1 + math.sqrt(1 + 2 * mu)) / 2, rel=3 * lr)
    assert values["constraints/x/lambda"] == pytest.approx(2.0, rel=mu + 3 * lr)


def test_one_constraint_with_adam():
    x = parameter(3.0)
    opt = l3ms.L3MOptimizer(
        torch.optim.Adam([x], lr=1.0, betas=(0.5, 0.9)),
        [l3ms.Constraint("x", min=1.0, margin=0.0)],
        mu=l3ms.ExponentialDecay(1.0, 0.05, steps=100),
        smoothing=1.0,
        max_grad_norm=10.0,
    )
    values = solve(opt, x, lambda x: (x**2).sum(), lambda x: {"x": x.sum()}, 250, 50, 1e-4)
    assert x.item() == pytest.approx((1 + math.sqrt(1.1)) / 2, rel=1e-3)
    assert values["constraints/x/lambda"] == pytest.approx(2 * x.item(), rel=0.02)


def test_two_constraints_share_the_work():
    """min x^2 + y^2 with x + y >= 2 and x >= 1.5: (1.5, 0.5), multipliers 1 and 2, times the scales 2 and 1.5; a third one is slack."""
    x = parameter(0.0, 0.0)
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=1.0),
        [
            l3ms.Constraint("sum", min=2.0, margin=0.0),
            l3ms.Constraint("x", min=1.5, margin=0.0),
            l3ms.Constraint("y", max=3.0, margin=0.0),
        ],
        mu=l3ms.ExponentialDecay(1.0, 1e-3, steps=250),
        smoothing=1.0,
        max_grad_norm=20.0,
    )
    values = solve(opt, x, lambda x: x.square().sum(), lambda x: {"sum": x.sum(), "x": x[0], "y": x[1]}, 250, 100, 1e-4)
    assert x.tolist() == pytest.approx([1.5, 0.5], abs=2e-3)
    assert values["constraints/sum/lambda"] == pytest.approx(2 * 1.0, rel=1e-2)
    assert values["constraints/x/lambda"] == pytest.approx(1.5 * 2.0, rel=1e-2)
    assert values["constraints/y/lambda"] == pytest.approx(0.0, abs=2e-3)
    assert not opt.conflicts.pairs


def test_bounds_on_both_sides_hold_at_the_nearer_one():
    """min (x - 7)^2 with 2 <= x <= 4: x = 4, lambda = 6 in units of the scale 1."""
    x = parameter(0.0)
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=1.0),
        [l3ms.Constraint("x", min=2.0, max=4.0, margin=0.0, scale=1.0)],
        mu=l3ms.ExponentialDecay(1.0, 1e-2, steps=150),
        smoothing=1.0,
        max_grad_norm=20.0,
    )
    values = solve(opt, x, lambda x: (x - 7).square().sum(), lambda x: {"x": x[0]}, 150, 80, 1e-4)
    assert x.item() == pytest.approx(4.0, abs=5e-3)
    assert values["constraints/x/lambda"] == pytest.approx(6.0, rel=1e-2)


def test_an_infeasible_pair_ends_at_the_least_violation_and_is_named(caplog):
    """x <= -1 and x >= 1, with a third constraint that holds and a task that pulls to 0.7, with less than max_grad_norm: two half-steps
    that are both clipped to the same length would cancel wherever they meet."""
    x = parameter(1.5)
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=1.0),
        [
            l3ms.Constraint("fine", max=50.0, margin=0.0),
            l3ms.Constraint("low", max=-1.0, margin=0.0),
            l3ms.Constraint("high", min=1.0, margin=0.0),
        ],
        mu=l3ms.ExponentialDecay(1.0, 0.1, steps=50),
        smoothing=1.0,
    )
    with caplog.at_level(logging.WARNING, logger="l3ms"):
        values = solve(
            opt,
            x,
            lambda x: 0.1 * (x - 0.7).square().sum(),
            lambda x: dict.fromkeys(("fine", "low", "high"), x.sum()),
            100,
            80,
            5e-4,
        )
    assert x.item() == pytest.approx(0.0, abs=2e-3)
    assert values["constraints/low/slack"] == pytest.approx(-1.0, abs=2e-3)
    assert values["constraints/high/slack"] == pytest.approx(-1.0, abs=2e-3)
    assert opt.conflicts.pairs == [("low", "high")]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "'low' and 'high'" in warnings[0]
    assert values["l3m/skipped_steps"] == 0


# ---- when a pair is named ----


def watched(violations, names=("a", "b", "c")):
    watch = ConflictWatch(list(names))
    for values in violations:
        watch.update(list(values))
    return watch


def test_a_pair_is_named_after_a_hundred_steps_without_progress():
    stuck = [(0.5, 0.5, -1.0)]
    assert watched(stuck * 101).pairs == []  # two set the mark
    assert watched(stuck * 102).pairs == [("a", "b")]
    assert watched(stuck * 500).pairs == [("a", "b")]  # once


def test_the_two_worst_of_three_are_named_in_the_order_of_the_constraints():
    assert watched([(0.9, 0.1, 1.0)] * 102).pairs == [("a", "c")]


@pytest.mark.parametrize(
    "violations",
    [
        [(0.5, -0.1, -1.0)] * 300,  # one violated constraint has nothing to conflict with
        [(0.5, math.nan, 0.0)] * 300,  # never observed, and exactly at its bound
        [(2 * 0.98**n, 0.98**n, -1.0) for n in range(300)],  # the worst improves
        ([(0.5, 0.5, -1.0)] * 90 + [(0.5, -0.5, -1.0)]) * 4,  # now and then one holds
        ([(0.5, 0.5, -1.0)] * 60 + [(-0.5, 0.5, 0.5)] * 60) * 3,  # not the same two
    ],
    ids=["alone", "unknown", "improving", "interrupted", "changing"],
)
def test_no_pair_is_named(violations):
    assert watched(violations).pairs == []


def test_the_watch_goes_on_from_its_state():
    first, second = watched([(0.5, 0.5, -1.0)] * 60), ConflictWatch(["a", "b", "c"])
    second.load_state_dict(first.state_dict())
    for _ in range(42):
        second.update([0.5, 0.5, -1.0])
    assert second.pairs == [("a", "b")]
