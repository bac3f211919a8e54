"""Derivatives of the head's ops: gradcheck, scaled and repeated backwards, and the refusal of second derivatives."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from head_cases import (
    BOTH,
    HEAD_BACKENDS,
    WEIGHTED_BACKENDS,
    Case,
    Inputs,
    grad_of,
)
from head_oracle import assert_close_to_oracle, condition_scales, multiplies_in, ulp, unfused
from torch import Tensor

import l3m_kernels
from l3m_kernels import log_likelihood, set_workspace

slow = pytest.mark.slow


def scalar(
    op: str, backend: str, case: Case, inputs: Inputs, leaves: dict[str, Tensor], of: ModuleType = l3m_kernels
) -> Tensor:
    """The loss of `inputs` with `leaves` in place of hidden, weight and bias; `of` may be `l3m_kernels.parallel` too."""
    hidden, weight, bias = leaves["hidden"], leaves["weight"], leaves.get("bias")
    options = case.options | {"bias": bias, "backend": backend}
    if op == "weighted":
        arguments = (hidden, weight, inputs.targets, inputs.seq_weight, inputs.cu_seqlens)
        return of.weighted_log_likelihood(*arguments, **options)[0]
    out = of.log_likelihood(hidden, weight, inputs.targets, inputs.cu_seqlens, **options)
    return (out.sequence * inputs.grad_sequence).sum() + (out.token * inputs.grad_token).sum()


def everything_weighted(inputs: Inputs) -> Inputs:
    """No zero among the upstream values, so that each row has a gradient."""
    return inputs._replace(
        **{name: getattr(inputs, name) + 0.3 for name in ("seq_weight", "grad_sequence", "grad_token")}
    )


# ---- first derivatives


def small(seed: int) -> Case:
    """A random case that finite differences are taken of."""
    drawn = Case.random(seed)
    return replace(
        drawn,
        dtype=torch.float64,
        lengths=drawn.lengths[:3],
        width=min(drawn.width, 3),
        vocabulary=min(drawn.vocabulary, 5),
        logit_size=min(drawn.logit_size, 2.0),
        view="contiguous" if drawn.view == "expanded" else drawn.view,  # finite differences need memory of their own
        workspace=drawn.workspace and 200,
    )


def gradcheck(op: str, backend: str, seed: int, of: ModuleType = l3m_kernels, **options) -> None:
    """Where every input is frozen or empty, the loss has no gradient."""
    case = small(seed)
    inputs = case.build()
    set_workspace(case.workspace)
    free = [name for name, leaf in inputs.leaves.items() if leaf.requires_grad and leaf.numel()]

    def loss(*values):
        return scalar(op, backend, case, inputs, inputs.leaves | dict(zip(free, values, strict=True)), of)

    if free:
        assert torch.autograd.gradcheck(loss, [inputs.leaves[name] for name in free], **options)
    else:
        assert loss().requires_grad == any(leaf.requires_grad for leaf in inputs.leaves.values())


@pytest.mark.parametrize(("op", "backend"), BOTH)
@pytest.mark.parametrize("seed", [*range(40), *(pytest.param(seed, marks=slow) for seed in range(1000, 3000))])
def test_gradcheck(op, backend, seed):
    gradcheck(op, backend, seed)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, -3.7, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "backend"), BOTH)
def test_scaled_loss(op, backend, dtype, scale):
    """GradScaler and gradient accumulation: `scale` is applied in the compute precision."""
    case = Case.plain(dtype=dtype, bias=False)
    inputs = everything_weighted(case.build())
    (scale * scalar(op, backend, case, inputs, inputs.leaves)).backward()
    found = {f"d_{name}": grad_of(leaf) for name, leaf in inputs.leaves.items()}
    scaled = inputs._replace(
        seq_weight=scale * inputs.seq_weight,
        grad_sequence=scale * inputs.grad_sequence,
        grad_token=scale * inputs.grad_token,
    )
    oracle = unfused(case, scaled, torch.float64, op == "weighted")
    for name, grad in found.items():
        # Rounded once where it is formed and once where it is scaled.
        error = (grad.double() - oracle[name]).abs()
        rounding = 1.1 * ulp(oracle[name].abs().clamp(min=1e-3), dtype)
        if multiplies_in(backend, dtype) == dtype != torch.float32:  # the gradients of the logits are rounded too
            rounding = rounding + 2 * ulp(condition_scales(case, scaled, op == "weighted")[name], dtype)
        assert bool((error <= rounding + 1e-5 * abs(scale)).all()), name


@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
def test_loss_scale_beyond_half_precision(backend):
    """The first scale of GradScaler is 65536, which is no fp16 number; the gradients are."""
    case = Case.plain(dtype=torch.float16, bias=False)
    inputs = everything_weighted(case.build())
    inputs = inputs._replace(seq_weight=inputs.seq_weight / 1024)
    (65536 * scalar("weighted", backend, case, inputs, inputs.leaves)).backward()
    oracle = unfused(case, inputs, torch.float64, weighted=True)
    for name, leaf in inputs.leaves.items():
        torch.testing.assert_close(grad_of(leaf).double(), 65536 * oracle[f"d_{name}"], rtol=3e-3, atol=1e-1)


@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
def test_loss_scale_saves_small_gradients(backend):
    """What GradScaler is for: in a mean over 65,536 tokens gradients underflow in fp16 unless they are scaled before they are rounded."""
    case = Case.plain(dtype=torch.float16, bias=False, lengths=(40,), width=16, vocabulary=64, softcap=None)
    inputs = case.build()
    inputs = inputs._replace(seq_weight=torch.full((1,), 1 / 65536))
    (65536 * scalar("weighted", backend, case, inputs, inputs.leaves)).backward()
    oracle = unfused(case, inputs, torch.float64, weighted=True)
    for name, leaf in inputs.leaves.items():
        truth = 65536 * oracle[f"d_{name}"]
        assert (grad_of(leaf).double() - truth).norm() < 5e-4 * truth.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "backend"), BOTH)
def test_repeated_backward(op, backend, dtype):
    """The same bits each time, also where the first gradients were changed in place; then the loss used twice."""
    case = Case.plain(dtype=dtype)
    inputs = everything_weighted(case.build())
    loss = scalar(op, backend, case, inputs, inputs.leaves)
    leaves = list(inputs.leaves.values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(-5)
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves, retain_graph=True), copies))
    loss.backward(retain_graph=True)
    for leaf in leaves:
        grad_of(leaf).zero_()
    loss.backward(retain_graph=True)
    assert all(torch.equal(grad_of(leaf), copy) for leaf, copy in zip(leaves, copies, strict=True))
    twice = torch.autograd.grad(loss + 3 * loss, leaves)
    for grad, copy in zip(twice, copies, strict=True):
        torch.testing.assert_close(grad, 4 * copy, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("op", "backend"), BOTH)
def test_inputs_are_not_modified(op, backend):
    case = Case.plain(dtype=torch.float32, workspace=500)
    inputs = case.build()
    set_workspace(case.workspace)
    before = [None if tensor is None else tensor.detach().clone() for tensor in inputs]
    loss = scalar(op, backend, case, inputs, inputs.leaves)
    loss.backward(retain_graph=True)
    loss.backward()
    for old, new in zip(before, inputs, strict=True):
        assert old is new is None or (old is not None and new is not None and torch.equal(old, new))


@pytest.mark.parametrize(("op", "backend"), BOTH)
def test_same_bits_each_time(op, backend):
    case = Case.plain(dtype=torch.float32, lengths=(40, 1, 70), vocabulary=301, width=48, workspace=40_000)
    inputs = case.build()
    set_workspace(case.workspace)
    results = []
    for _ in range(3):
        loss = scalar(op, backend, case, inputs, inputs.leaves)
        results.append((loss, *torch.autograd.grad(loss, list(inputs.leaves.values()))))
    for repeat in results[1:]:
        assert all(map(torch.equal, results[0], repeat))


@pytest.mark.parametrize("which", ["sequence", "token"])
@pytest.mark.parametrize("backend", HEAD_BACKENDS)
def test_one_output_used(which, backend):
    """An output that the loss leaves out has no upstream gradient at all."""
    case = Case.plain(dtype=torch.float32)
    inputs = case.build()
    out = log_likelihood(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.cu_seqlens,
        bias=inputs.bias,
        backend=backend,
        **case.options,
    )
    upstream = {"sequence": inputs.grad_sequence, "token": inputs.grad_token}[which]
    getattr(out, which).backward(upstream)
    left_out = {"sequence": "grad_token", "token": "grad_sequence"}[which]
    only = inputs._replace(**{left_out: torch.zeros_like(getattr(inputs, left_out))})
    found = {f"d_{name}": grad_of(leaf) for name, leaf in inputs.leaves.items()}
    assert_close_to_oracle(case, only, found, weighted=False, backend=backend)


@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
def test_no_gradient_is_formed_without_grad_mode(backend):
    case = Case.plain(dtype=torch.float32)
    inputs = case.build()
    with torch.no_grad():
        loss = scalar("weighted", backend, case, inputs, inputs.leaves)
    assert not loss.requires_grad
    assert torch.equal(loss, scalar("weighted", backend, case, inputs, inputs.leaves).detach())


# ---- second derivatives


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("of", ["hidden", "weight", "bias"])
@pytest.mark.parametrize(("op", "backend"), BOTH)
def test_double_backward_is_refused_by_name(op, backend, of, scale):
    case = Case.plain(dtype=torch.float32)
    inputs = everything_weighted(case.build())
    below = inputs.hidden.detach().clone().requires_grad_()  # also where hidden comes from the rest of a model
    leaves = inputs.leaves | {"hidden": below.tanh()}
    loss = scale * scalar(op, backend, case, inputs, leaves)
    (grad,) = torch.autograd.grad(loss, leaves[of], create_graph=True)
    torch.testing.assert_close(grad.detach(), torch.autograd.grad(loss, leaves[of], retain_graph=True)[0])
    for source in (below, leaves["weight"], leaves["bias"]):
        with pytest.raises(RuntimeError, match=r"log_likelihood .* no second derivative \(double backward\)"):
            torch.autograd.grad(grad.square().sum(), source, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
def test_gradient_is_differentiable_in_the_loss_scale(backend):
    case = Case.plain(dtype=torch.float32)
    inputs = everything_weighted(case.build())
    loss = scalar("weighted", backend, case, inputs, inputs.leaves)
    scale = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(scale * loss, inputs.weight, create_graph=True)
    (slope,) = torch.autograd.grad(grad.sum(), scale)
    torch.testing.assert_close(slope, grad.detach().sum() / 2)
