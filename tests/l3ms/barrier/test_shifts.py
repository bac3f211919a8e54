"""The shift of the bounds: a barrier whose mu stops has the constrained problem's solution all the same."""

import copy
import itertools
import math

import pytest
import torch

import l3ms
from l3m_kernels import Bounds
from l3ms.barrier import shifts


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def solve(schedule, steps=1500, **bounds):
    """min x^2 with a bound on x, alternating half-steps; -> x where the constraint sees it, its multiplier, the optimizer."""
    x = torch.nn.Parameter(f64(1.5))
    constraint = l3ms.Constraint("x", margin=0.0, **bounds)
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=0.01), [constraint], mu=schedule, smoothing=1.0, max_grad_norm=100.0
    )
    for _ in range(steps):
        (x**2).sum().backward()
        opt.step()
        opt.zero_grad()
        opt.barrier_loss({"x": x.sum()}).backward()
        opt.step()
        opt.zero_grad()
    values = opt.metrics()
    return values["constraints/x/estimate"], values["constraints/x/lambda"], opt


def test_at_a_constant_mu_the_shift_finds_the_solution_and_its_multiplier():
    """min x^2, x >= 1 has x = 1, lambda = 2; the barrier alone rests at (1 + sqrt(1 + 2 mu)) / 2 = 1.2."""
    fixed, moving = l3ms.ExponentialDecay(0.5, 0.5, 1), l3ms.NoiseFloorDecay(0.5, 0.5, 1)
    x, _, _ = solve(fixed, 500, min=1.0)
    assert x == pytest.approx((1 + math.sqrt(2)) / 2, rel=0.02)
    x, multiplier, opt = solve(moving, min=1.0)
    assert x == pytest.approx(1.0, abs=3e-3)
    assert multiplier == pytest.approx(2.0, rel=0.03)  # 2 / (1 - 2 lr), and what is left of the way
    assert opt.estimates.integral.shift[0] < 0.0  # outwards: the slack was mu / lambda


def test_a_narrow_range_rests_at_the_bound_the_task_is_at():
    """min x^2, 1 <= x <= 1.2: both sides of a barrier with mu = 0.5 push at once; shifted, the far side lets go."""
    x, _, opt = solve(l3ms.NoiseFloorDecay(0.5, 0.5, 1), 3000, min=1.0, max=1.2)
    assert x == pytest.approx(1.0, abs=0.01)
    last = opt.estimates.last
    assert last is not None
    low, high = last.multiplier.tolist()
    assert low * 1 / 1.1 - high * 1 / 1.1 == pytest.approx(2.0, rel=0.05)


def test_only_where_mu_waits_for_the_noise():
    for schedule, solver in ((l3ms.ExponentialDecay(0.5, 0.1, 10), "barrier"), ("auto", "dual_ascent")):
        x = torch.nn.Parameter(f64(0.0))
        opt = l3ms.L3MOptimizer(
            torch.optim.SGD([x], lr=0.1), [l3ms.Constraint("x", min=1.0)], mu=schedule, solver=solver
        )
        opt.barrier_loss({"x": x.sum()}).backward()
        opt.step()
        assert opt.estimates.integral.shift.tolist() == [0.0]


def follow(violations, shift=0.0, noise=0.0, width=math.inf):
    """The shift of one bound after each of its violations."""
    integral, path = shifts.Integral(f64(shift), f64(math.nan)), []
    for violation in violations:
        integral = shifts.advance(integral, f64(violation), f64(noise), f64(width))
        path.append(integral.shift.item())
    return path


def test_the_shift_is_the_integral_of_the_violation():
    assert follow([0.1, 0.1, -0.2]) == pytest.approx([0.005, 0.01, 0.0])
    assert follow([5.0]) == pytest.approx([0.05 * 0.25])
    assert follow([1.0], shift=0.499) == [0.5]
    assert follow([-3.0], shift=-0.499) == [-0.5]
    assert follow([math.nan], shift=0.2, noise=math.inf) == [0.2]


def test_a_violation_that_shrinks_by_itself_does_not_count():
    path = follow([1.0 - 0.01 * n for n in range(90)])
    assert path[-1] == path[1]  # but the first two, of which it is not known yet
    assert follow([0.5] * 60)[-1] > 0.4  # one that stays does


def test_a_start_from_far_away_is_soon_forgotten():
    """30 to 0.4 in 10 steps, where the violation stays: the average alone would call that shrinking for 90 steps more."""
    fall = [30.0 * (0.4 / 30.0) ** (n / 10) for n in range(11)]
    path = follow(fall + [0.4] * 50, noise=0.1)
    assert path[10] == path[0]  # but the first, of which it is not known yet
    assert path[50] > path[10] + 0.1


def test_it_aims_further_inside_by_the_noise_but_never_across_a_range():
    assert follow([-0.03], noise=0.02) == pytest.approx([0.0])
    assert follow([-0.03], noise=0.02, width=0.1) == pytest.approx([0.05 * (-0.03 + 0.02)])


def test_a_positive_shift_moves_both_bounds_inwards():
    bounds = Bounds.of([(0, -1.0, 40.0, 45.0, 0.0, 2.0, 2.5), (0, 1.0, 50.0, 45.0, 0.0, 2.0, 2.5)])
    table = shifts.shifted(bounds.table, f64(0.1, 0.02))
    assert table[:, 1].tolist() == pytest.approx([44.5, 49.1])
    table[:, 1] = bounds.table[:, 1]
    assert torch.equal(table, bounds.table)


def test_metrics_speak_of_the_bounds_as_given_and_the_state_keeps_the_shift():
    x = torch.nn.Parameter(f64(0.5))

    def make():
        return l3ms.L3MOptimizer(torch.optim.SGD([x], lr=0.0), [l3ms.Constraint("x", min=1.0, margin=0.0)])

    opt = make()
    for _ in range(3):
        opt.barrier_loss({"x": x.sum()}).backward()
        opt.step()
        opt.zero_grad()
        assert opt.metrics()["constraints/x/slack"] == pytest.approx(-0.5)
    assert opt.estimates.integral.shift.tolist() == pytest.approx([3 * 0.05 * 0.25])
    other = make()
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(other.estimates.integral.shift, opt.estimates.integral.shift)


# ---- the share of the task ----


def optimizer(x, **options):
    constraint = l3ms.Constraint("x", max=1.0, margin=0.0)
    return l3ms.L3MOptimizer(torch.optim.SGD([x], lr=0.02), [constraint], **options)


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


def test_the_share_falls_once_a_shift_has_grown_large():
    assert shifts.task_share(f64(-0.3, 0.15)) == 1.0
    assert shifts.task_share(f64(0.3, -0.5)).item() == pytest.approx(math.exp(-1.0))
    assert shifts.task_share(f64(0.5)).item() == pytest.approx(0.1, abs=0.01)
    assert shifts.task_share(f64()) == 1.0


@pytest.mark.parametrize("clipping", ["separate", "adaptive"])
def test_the_share_multiplies_the_tasks_step_also_where_it_is_clipped(clipping):
    """Multiplied before the clipping, a gradient of ten times max_grad_norm would take all of its step whatever the share is."""
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = optimizer(x, clipping=clipping)
    task = f64(0.3, 0.4, 0.0)
    assert torch.equal(task_step(opt, x, task), 0.02 * task)
    for _ in range(24):
        constraint_step(opt, x, [2.9, 3.1])
    share = math.exp(-(24 * 0.05 * 0.25 - 0.15) / 0.15) if clipping == "adaptive" else 1.0
    assert opt.metrics().get("l3m/task_share", 1.0) == pytest.approx(share)
    torch.testing.assert_close(task_step(opt, x, task), 0.02 * share * task)
    torch.testing.assert_close(task_step(opt, x, 100 * task), 0.02 * share * 2 * task)  # the gradient's norm is 50
    torch.testing.assert_close(task_step(opt, x, 1e9 * task), 0.02 * share * 2 * task)


def test_a_bound_against_a_task_whose_gradient_is_far_above_the_clipping_is_met():
    """Both half-steps have norm 1, and most of the constraint's points aside: the task's has to give way."""
    x = torch.nn.Parameter(f64(0.0, 0.0))
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=0.05),
        [l3ms.Constraint("far", max=1.0, scale=1.0)],
        clipping="adaptive",
    )
    for step in range(400):
        (-100 * x[0]).backward()
        opt.step()
        opt.zero_grad()
        aside = 3.0 * (-1) ** step  # what samples add to a gradient, and what cancels over the steps
        opt.barrier_loss({"far": x[0] + aside * (x[1] - x[1].detach()) + f64(-0.1, 0.1)}).backward()
        opt.step()
        opt.zero_grad()
    assert x[0].item() < 1.0


def test_a_skipped_step_moves_nothing():
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = optimizer(x)
    constraint_step(opt, x, [2.0, 4.0])
    shift = opt.estimates.integral.shift.clone()
    constraint_step(opt, x, [2.0, 4.0], math.inf)
    assert opt.skipped_steps == 1
    assert torch.equal(opt.estimates.integral.shift, shift)


def rest(clipping):
    """Where x ends: the task pulls with 0.9, the constraint x <= 1 is seen through noise of three times its gradient.

    lambda = 0.9 would do. Clipped to 1, the constraint's step keeps 1 / sqrt(10) of its gradient: less than the task's pull, whatever
    lambda is.
    """
    x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = optimizer(x, clipping=clipping, mu=l3ms.NoiseFloorDecay(1.0, 0.3, steps=50), smoothing=0.2)
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
    assert rest("adaptive") < 1.2


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="clipping must be one of adaptive, separate, got 'none'"):
        optimizer(torch.nn.Parameter(torch.zeros(1)), clipping="none")


@pytest.mark.parametrize(("value", "slack"), [(1.5, 0.5), (8.0, 2.0), (-1.0, -2.0), (11.0, -1.0)])
def test_the_slack_of_a_range_is_that_of_the_nearer_bound(value, slack):
    x = torch.nn.Parameter(f64(value))
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=0.0), [l3ms.Constraint("x", min=1.0, max=10.0, scale=1.0, margin=0.0)]
    )
    opt.barrier_loss({"x": x.sum()}).backward()
    opt.step()
    assert opt.metrics()["constraints/x/slack"] == pytest.approx(slack)
