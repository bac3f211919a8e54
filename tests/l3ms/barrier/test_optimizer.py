"""One `step()` of `L3MOptimizer` against the textbook's, and what a half-step commits and leaves alone."""

import math
from typing import Any

import pytest
import torch

import l3ms

MU = 1e-6
S_RELAXED = MU * MU


def violation_of(multiplier, mu):
    """C with B'(C) = multiplier: inside the barrier, or beyond it."""
    s = mu * mu
    inside = -mu / multiplier
    return inside if inside <= -s else multiplier * s * s / mu - 2 * s


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (5,), (2, 2, 2))
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "momentum_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


def make(params, base="sgd", max_grad_norm: float | None = 1.0, mu: Any = MU, **options):
    constraint = l3ms.Constraint("c", max=1.0, scale=1.0, margin=0.0)
    schedule = l3ms.ExponentialDecay(mu, mu, 1) if isinstance(mu, float) else mu
    return l3ms.L3MOptimizer(
        OPTIMIZERS[base](params), [constraint], mu=schedule, smoothing=1.0, max_grad_norm=max_grad_norm, **options
    )


def directions(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


def task_gradient(opt, gradients):
    params = [p for group in opt.param_groups for p in group["params"]]
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient.clone()


def constraint_gradient(opt, params, gradients, violation, value=None):
    """Gradient lambda / S * direction, by autograd through a linear function whose value is 1 + violation."""
    linear = torch.stack([(p * g).sum() for p, g in zip(params, gradients, strict=True)]).sum()
    wanted = 1.0 + violation if value is None else value
    opt.zero_grad()
    opt.barrier_loss({"c": linear.double() - linear.detach().double() + wanted}).backward()


def textbook(params, gradients, base, max_norm):
    """clip_grad_norm_ and step, in float64 by hand for the clip."""
    norm = math.sqrt(math.fsum(float((g.double() ** 2).sum()) for g in gradients))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = (gradient.double() * factor).to(parameter.dtype)
    base.step()


@pytest.mark.parametrize("base", OPTIMIZERS)
@pytest.mark.parametrize("multiplier", [1e-5, 1e-2, 0.1, 0.3, 1.0, 7.0, 1e3, 1e9, 1e17])
def test_a_step_is_the_textbooks_clipped_step(base, multiplier):
    """g = lambda * direction is formed in float64 here; the optimizer only ever sees lambda / S."""
    params, expected = parameters(torch.float64), parameters(torch.float64)
    opt, plain = make(params, base), OPTIMIZERS[base](expected)
    violation = violation_of(multiplier, MU)
    value = 1.0 + violation  # rounded to float64: the multiplier is that of the rounded one
    exact = value - 1.0
    exact_multiplier = MU / -exact if exact <= -S_RELAXED else MU / S_RELAXED * ((exact + 2 * S_RELAXED) / S_RELAXED)
    for seed in range(3):  # the state of the base optimizer is shared by both half-steps
        task, barrier = directions(params, 2 * seed + 1), directions(params, 2 * seed + 2)
        task_gradient(opt, task)
        opt.step()
        textbook(expected, task, plain, 1.0)
        constraint_gradient(opt, params, barrier, exact, value)
        assert opt.estimates.pending is not None
        assert opt.estimates.pending.multiplier.item() == pytest.approx(exact_multiplier, rel=1e-12)
        opt.step()
        textbook(expected, [exact_multiplier * g for g in barrier], plain, 1.0)
        for ours, theirs in zip(params, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 5.0, None])
@pytest.mark.parametrize("multiplier", [0.2, 40.0])
def test_the_clip_is_at_max_grad_norm(max_norm, multiplier):
    params, expected = parameters(torch.float64), parameters(torch.float64)
    opt, plain = make(params, "sgd", max_norm, mu=0.1), OPTIMIZERS["sgd"](expected)
    gradients = directions(params)
    constraint_gradient(opt, params, gradients, violation_of(multiplier, 0.1))
    opt.step()
    textbook(expected, [multiplier * g for g in gradients], plain, math.inf if max_norm is None else max_norm)
    for ours, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("base", OPTIMIZERS)
@pytest.mark.parametrize("size", [1.0, 1e-18, 1e12])
def test_a_multiplier_of_1e17_in_fp32_neither_overflows_nor_vanishes(base, size):
    """The textbook's own gradient 1e17 * direction has an infinite norm in fp32, and its clipped step is 0."""
    params, expected = parameters(torch.float32), parameters(torch.float64)
    opt, plain = make(params, base), OPTIMIZERS[base](expected)
    gradients = [size * g for g in directions(params)]
    constraint_gradient(opt, params, gradients, 0.1)
    multiplier = opt.estimates.pending.multiplier.item()  # type: ignore[union-attr]
    assert multiplier == pytest.approx(1e17, rel=1e-6)
    opt.step()
    assert opt.skipped_steps == 0
    textbook(expected, [multiplier * g.double() for g in gradients], plain, 1.0)
    for ours, theirs, start in zip(params, expected, parameters(torch.float32), strict=True):
        assert ours.isfinite().all()
        moved = ours - start
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(moved.double(), theirs.detach() - start.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", OPTIMIZERS)
def test_the_task_step_alone_is_the_base_optimizers(base):
    """Without an observation it is clip_grad_norm_ and step, bit for bit where nothing is clipped."""
    params, expected = parameters(torch.float32), parameters(torch.float32)
    opt, plain = make(params, base, max_grad_norm=100.0), OPTIMIZERS[base](expected)
    for seed in range(4):
        gradients = directions(params, seed)
        task_gradient(opt, gradients)
        opt.step()
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = gradient.clone()
        plain.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(params, expected, strict=True))
    assert opt.constraint_steps == 0
    assert opt.metrics()["l3m/mu"] == MU


def test_grad_norms_are_reported_before_clipping():
    params = parameters(torch.float64)
    opt = make(params, mu=0.1)
    gradients = directions(params)
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    task_gradient(opt, gradients)
    opt.step()
    constraint_gradient(opt, params, gradients, violation_of(50.0, 0.1))
    opt.step()
    values = opt.metrics()
    assert values["l3m/grad_norm/task"] == pytest.approx(norm, rel=1e-14)
    assert values["l3m/grad_norm/constraint"] == pytest.approx(norm, rel=1e-8)  # divided by S = lambda


# ---- steps that are not taken ----


def snapshot(opt):
    tensors = [t.clone() for state in opt.base.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    params = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    return [*params, *tensors, opt.estimates.state.clone(), opt.mu.clone()]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["task", "constraint"])
@pytest.mark.parametrize("schedule", [l3ms.ExponentialDecay, l3ms.NoiseFloorDecay])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad, half, schedule):
    """mu stays too: of the first schedule it follows from the steps taken, of the second from the mu before."""
    params = parameters(torch.float32)
    opt = make(params, "adamw", mu=schedule(1.0, 0.1, 10))
    task_gradient(opt, directions(params))
    opt.step()
    constraint_gradient(opt, params, directions(params), 0.3)
    opt.step()
    before = snapshot(opt)
    if half == "task":
        task_gradient(opt, directions(params))
    else:
        constraint_gradient(opt, params, directions(params), 0.9)
    params[1].grad[2] = bad  # type: ignore[index]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(opt), strict=True))
    assert opt.metrics()["l3m/skipped_steps"] == 1
    assert opt.constraint_steps == 1
    opt.zero_grad()
    task_gradient(opt, directions(params))
    opt.step()  # a task step, whatever was pending
    assert opt.constraint_steps == 1
    assert opt.skipped_steps == 1


def test_five_in_a_row_raise_and_name_the_constraint():
    x = torch.nn.Parameter(torch.ones(2))
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=0.1), [l3ms.Constraint("kind", max=9.0), l3ms.Constraint("polite", min=5.0)], mu="paper"
    )

    def constraint_step(gradient):
        opt.zero_grad()
        opt.barrier_loss({"kind": x.sum(), "polite": x.sum()}).backward()
        assert x.grad is not None
        x.grad.mul_(gradient)
        opt.step()

    for _ in range(4):
        constraint_step(math.nan)
    constraint_step(1.0)  # a good one starts the count again
    for _ in range(4):
        constraint_step(math.inf)
    with pytest.raises(RuntimeError, match="constraint 'polite' was not finite in 5 steps in a row"):
        constraint_step(math.inf)
    assert opt.skipped_steps == 9
    assert torch.isfinite(x).all()


def test_the_task_is_named_where_its_gradient_is_at_fault():
    params = parameters(torch.float32)
    opt = make(params, max_skipped=2)
    task_gradient(opt, [g * math.nan for g in directions(params)])
    opt.step()
    with pytest.raises(RuntimeError, match="the task loss was not finite in 2 steps"):
        opt.step()


@pytest.mark.parametrize("base", OPTIMIZERS)
def test_a_zero_gradient_of_the_constraints_is_not_stepped_on(base):
    """Momentum and weight decay would move the weights although nothing asks for it; the estimates do advance."""
    params = parameters(torch.float32)
    opt = make(params, base)
    task_gradient(opt, directions(params))
    opt.step()
    before = snapshot(opt)[:-2]
    weights = opt.observe({"c": [2.0, 2.0, 2.0]})
    opt.zero_grad()
    (sum(p.sum() for p in params) * weights.sum()).backward()
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(opt)[:-2], strict=True))
    assert opt.constraint_steps == 1
    assert opt.metrics()["constraints/c/estimate"] == 2.0
    assert opt.skipped_steps == 0


def test_a_zero_gradient_of_the_task_is_a_step_of_the_base_optimizer():
    params, expected = parameters(torch.float32), parameters(torch.float32)
    opt, plain = make(params, "adamw"), OPTIMIZERS["adamw"](expected)
    for tensors in (params, expected):
        for p in tensors:
            p.grad = torch.zeros_like(p)
    opt.step()
    plain.step()  # weight decay
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_the_half_steps_alternate_by_what_was_observed():
    params = parameters(torch.float64)
    opt = make(params, mu=0.1)
    for kind in "ctccttc":
        if kind == "c":
            constraint_gradient(opt, params, directions(params), 0.1)
        else:
            task_gradient(opt, directions(params))
        before = opt.constraint_steps
        opt.step()
        assert opt.constraint_steps - before == (kind == "c")
        assert opt.estimates.pending is None


def test_frozen_parameters_and_parameters_without_a_gradient_are_left_alone():
    params = parameters(torch.float32)
    params[0].requires_grad_(False)
    before = [p.detach().clone() for p in params]
    opt = make(params, mu=0.1)
    opt.barrier_loss({"c": params[1].sum() + 3.0}).backward()
    opt.step()
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[2], before[2])
    assert not torch.equal(params[1], before[1])


def test_values_of_a_constraint_may_be_a_batch_whose_mean_is_bounded():
    """barrier_loss on (n,) values: the gradient of lambda * C(mean), in units of S."""
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=1.0),
        [l3ms.Constraint("c", max=2.0, margin=0.0), l3ms.Constraint("d", min=8.0, margin=0.0)],
        mu=l3ms.ExponentialDecay(0.5, 0.5, 1),
        max_grad_norm=None,
    )
    loss = opt.barrier_loss({"c": x, "d": x.sum()})
    loss.backward()
    c, d, s = (3 - 2) / 2, (8 - 9) / 8, 0.25
    lambdas = [0.5 / s * ((v + 2 * s) / s) for v in (c, d)]  # both nearer than s
    total = sum(lambdas)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx((lambdas[0] * c + lambdas[1] * d) / total, rel=1e-12)
    gradient = (lambdas[0] / 2 / 3 - lambdas[1] / 8) / total
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([gradient] * 3, rel=1e-12)
    before = x.detach().clone()
    opt.step()
    assert (before - x).tolist() == pytest.approx([gradient * total] * 3, rel=1e-12)
    assert opt.metrics()["constraints/c/stderr"] == pytest.approx(math.sqrt(7 / 3))


def test_overflows_that_a_scaler_finds_do_not_count_towards_giving_up():
    """GradScaler halves its scale until the gradients fit, which may take more than five steps; they are skipped and counted."""
    params = parameters(torch.float64)
    opt = make(params)
    before = [p.detach().clone() for p in params]
    vars(opt)["found_inf"] = torch.tensor(1.0)  # as GradScaler sets it around step()
    for _ in range(7):
        task_gradient(opt, directions(params))
        opt.step()
    del vars(opt)["found_inf"]
    assert opt.skipped_steps == 7
    assert all(torch.equal(p.detach(), was) for p, was in zip(params, before, strict=True))
