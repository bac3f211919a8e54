"""Joint steps: one step on the gradient of the whole barrier problem, clipped as a whole."""

import math

import pytest
import torch
from training_runs import assert_same_weights, losses

import l3ms
import l3ms.training.constraining


@pytest.mark.parametrize("mu", [0.1, 0.02])
def test_a_joint_step_in_a_loop_finds_the_solution_exactly(mu):
    """min x^2, x >= 1: x = (1 + sqrt(1 + 2 mu)) / 2, with no error of alternation."""
    x = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([x], lr=1e-4), [l3ms.Constraint("x", min=1.0, margin=0.0)],
        mu=l3ms.ExponentialDecay(1.0, mu, steps=50), smoothing=1.0, max_grad_norm=None,
    )  # fmt: skip
    for group in opt.param_groups:
        group["lr"] = 0.2 * mu  # the curvature at the solution is about lambda^2 / mu
    for _ in range(int(15 / mu)):
        barrier = opt.barrier_loss({"x": x.sum()})
        (opt.task_weight * (x**2).sum() + barrier).backward()
        opt.step()
        opt.zero_grad()
    assert x.item() == pytest.approx((1 + math.sqrt(1 + 2 * mu)) / 2, rel=1e-6)
    assert opt.metrics()["constraints/x/lambda"] == pytest.approx(2 * x.item(), rel=1e-6)


def test_the_task_weight_is_one_where_nothing_was_observed():
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = l3ms.L3MOptimizer(torch.optim.SGD([x], lr=0.1), [l3ms.Constraint("x", min=1.0)])
    assert opt.task_weight == 1.0
    opt.barrier_loss({"x": x.sum()})
    pending = opt.estimates.pending
    assert pending is not None
    assert opt.task_weight == 1.0 / pending.multiplier.sum().clamp(min=1.0)


def test_the_trainer_steps_on_task_plus_barrier(make_model, train, monkeypatch):
    """With SGD, unclipped, the step is lr (g_task + S g'), and plain fine-tuning's is lr g_task."""
    plain, _ = train(make_model(), solver="none", constraints=(), max_steps=1, max_grad_norm=0)
    seen = []

    def known(trainer):
        trainer.l3m_optimizer.observe({"length": [9.0, 9.5, 8.0]})  # far above max 6
        for p in trainer.model.parameters():
            assert p.grad is None
            p.grad = torch.full_like(p, 1e-3)
        seen.append(float(1 / trainer.l3m_optimizer.task_weight))

    monkeypatch.setattr(l3ms.training.constraining, "constraint_backward", known)
    joint, _ = train(make_model(), half_steps="joint", max_steps=1, max_grad_norm=0)
    assert seen[0] > 2.0
    rate = 0.05  # the learning rate of these runs
    assert joint.l3m_optimizer.constraint_steps == 1
    ours, theirs = dict(joint.model.named_parameters()), dict(plain.model.named_parameters())
    for name, parameter in ours.items():
        torch.testing.assert_close(
            theirs[name] - parameter, torch.full_like(parameter, rate * seen[0] * 1e-3), atol=2e-6, rtol=1e-3
        )


def test_accumulated_micro_batches_are_one_batch(make_model, train):
    options = {"half_steps": "joint"}
    parts, _ = train(make_model(), gradient_accumulation_steps=2, per_device_train_batch_size=4, **options)
    whole, _ = train(make_model(), gradient_accumulation_steps=1, per_device_train_batch_size=8, **options)
    assert_same_weights(parts.model, whole.model)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert parts.l3m_optimizer.constraint_steps == 3


def test_a_wrong_name_is_refused(make_model, train):
    with pytest.raises(ValueError, match="half_steps must be alternating or joint, got 'both'"):
        train(make_model(), half_steps="both", start=False)
