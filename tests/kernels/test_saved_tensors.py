"""What backwards find saved: recomputed by torch's checkpoints, moved to the host, packed by hooks; the gradients keep their bits.

A saved tensor is read once in a backward: each read unpacks it anew, and a checkpoint without reentrance refuses the second.
"""

from functools import partial

import pytest
import torch
from head_cases import BOTH, Case
from test_ops_autograd import everything_weighted, scalar
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from l3m_kernels import barrier_multiplier, log_likelihood, relaxed_log_barrier, weighted_log_likelihood

both = pytest.mark.parametrize(("op", "backend"), BOTH)


def problem(op, backend, dtype=torch.float32, **changes):
    """-> a loss of (hidden, weight, bias), and these; hidden comes from the rest of a model."""
    case = Case.plain(dtype=dtype, **changes)
    inputs = everything_weighted(case.build())
    names = list(inputs.leaves)

    def loss(*values: Tensor) -> Tensor:
        leaves = dict(zip(names, values, strict=True))
        return scalar(op, backend, case, inputs, leaves | {"hidden": leaves["hidden"].tanh()})

    return loss, [leaf.detach().requires_grad_(name not in case.frozen) for name, leaf in inputs.leaves.items()]


def gradients(loss, leaves, times: int = 1) -> list[Tensor]:
    """Of `loss` by `.backward()`, which every kind of checkpoint knows; the last of `times`."""
    for leaf in leaves:
        leaf.grad = None
    for left in reversed(range(times)):
        for leaf in leaves:
            leaf.grad = None
        loss.backward(retain_graph=left > 0)
    return [torch.empty(0) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


def selective(policy):
    return partial(create_selective_checkpoint_contexts, lambda context, op, *_, **__: policy(op))


def only_ours(op) -> CheckpointPolicy:
    ours = str(op).startswith("l3m_kernels")
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


def all_but_ours(op) -> CheckpointPolicy:
    ours = str(op).startswith("l3m_kernels")
    return CheckpointPolicy.MUST_RECOMPUTE if ours else CheckpointPolicy.MUST_SAVE


def nested(function, *values: Tensor) -> Tensor:
    inner = partial(checkpoint, function, use_reentrant=False)
    return checkpoint(lambda *given: 2 * inner(*given), *values, use_reentrant=False) / 2


def without_early_stop(function, *values: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *values, use_reentrant=False)


CHECKPOINTS = {
    "reentrant": lambda function, *values: checkpoint(function, *values, use_reentrant=True),
    "not reentrant": lambda function, *values: checkpoint(function, *values, use_reentrant=False),
    "without early stop": without_early_stop,
    "nested": nested,
    "ours are kept": lambda function, *values: checkpoint(
        function, *values, use_reentrant=False, context_fn=selective(only_ours)
    ),
    "the others are kept": lambda function, *values: checkpoint(
        function, *values, use_reentrant=False, context_fn=selective(all_but_ours)
    ),
}


def under_hooks(hooks, function, *values: Tensor) -> Tensor:
    with hooks:
        return function(*values)


def through_lists() -> saved_tensors_hooks:
    """As a hook that compresses or writes to a disk: what comes back is another tensor each time."""
    return saved_tensors_hooks(lambda tensor: (tensor.tolist(), tensor), _rebuilt)


def _rebuilt(packed: tuple) -> Tensor:
    values, like = packed
    return torch.tensor(values, dtype=like.dtype).reshape(like.shape)


HOOKS = {
    "save_on_cpu": save_on_cpu,
    "rebuilt": through_lists,
    "handed back": lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
}


@both
@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint(op, backend, kind, dtype):
    loss, leaves = problem(op, backend, dtype)
    plain = loss(*leaves)
    wanted = gradients(plain, leaves)
    recomputed = CHECKPOINTS[kind](loss, *leaves)
    assert torch.equal(recomputed, plain)
    assert all(map(torch.equal, gradients(recomputed, leaves), wanted))


@both
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("hidden", "bias")])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpoint_of_a_part_that_is_frozen(op, backend, frozen, kind):
    loss, leaves = problem(op, backend, frozen=frozen)
    wanted = gradients(loss(*leaves), leaves)
    assert any(grad.numel() for grad in wanted)
    assert all(map(torch.equal, gradients(CHECKPOINTS[kind](loss, *leaves), leaves), wanted))


@both
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpoint_whose_parameters_are_not_arguments(op, backend, kind):
    """As in a model: the head's matrix belongs to the module."""
    loss, (hidden, *parameters) = problem(op, backend)
    wanted = gradients(loss(hidden, *parameters), [hidden, *parameters])
    recomputed = CHECKPOINTS[kind](lambda given: loss(given, *parameters), hidden)
    assert all(map(torch.equal, gradients(recomputed, [hidden, *parameters]), wanted))


@both
def test_checkpoint_of_a_region_that_goes_on(op, backend):
    """More tensors are saved after the op's: the early stop comes after it."""
    loss, leaves = problem(op, backend)

    def further(*values):
        return (0.1 * loss(*values)).exp().sin()

    wanted = gradients(further(*leaves), leaves)
    assert all(map(torch.equal, gradients(checkpoint(further, *leaves, use_reentrant=False), leaves), wanted))


@both
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_compiled_checkpoint(op, backend, kind):
    loss, leaves = problem(op, backend)
    wanted = gradients(loss(*leaves), leaves)
    compiled = torch.compile(partial(CHECKPOINTS[kind], loss), backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled(*leaves), leaves), wanted))


@both
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(op, backend, kind):
    loss, leaves = problem(op, backend)
    wanted = gradients(loss(*leaves), leaves)
    assert all(map(torch.equal, gradients(under_hooks(HOOKS[kind](), loss, *leaves), leaves), wanted))


@both
@pytest.mark.parametrize("kind", ["not reentrant", "nested", *HOOKS])  # torch refuses it for a selective one
def test_second_backward(op, backend, kind):
    """The same bits, though the first gradients were added to in place."""
    loss, leaves = problem(op, backend)
    wanted = gradients(loss(*leaves), leaves)
    saved = partial(under_hooks, HOOKS[kind]()) if kind in HOOKS else CHECKPOINTS[kind]
    found = saved(loss, *leaves)
    found.backward(retain_graph=True)
    for leaf in leaves:
        assert leaf.grad is not None
        leaf.grad.mul_(-5)
    assert all(map(torch.equal, gradients(found, leaves, times=2), wanted))


@pytest.mark.parametrize("op", ["log_likelihood", "weighted"])
def test_each_saved_tensor_is_read_once(op):
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    def unpack(index):
        unpacked.append(index)
        return packed[index]

    loss, leaves = problem(op, "reference")
    found = under_hooks(saved_tensors_hooks(pack, unpack), loss, *leaves)
    for _ in range(2):
        unpacked.clear()
        found.backward(retain_graph=True)
        assert sorted(unpacked) == list(range(len(packed)))


@both
@pytest.mark.parametrize("kind", ["not reentrant", "ours are kept", *HOOKS])
def test_second_derivative_is_refused_by_name(op, backend, kind):
    loss, leaves = problem(op, backend)
    saved = partial(under_hooks, HOOKS[kind]()) if kind in HOOKS else CHECKPOINTS[kind]
    (grad,) = torch.autograd.grad(saved(loss, *leaves), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative \(double backward\)"):
        grad.square().sum().backward()


@both
def test_seen_statistics_of_a_checkpoint(op, backend):
    """What the region returns beside the loss is that of its first pass, and needs no second."""
    case = Case.plain(dtype=torch.float32)
    inputs = everything_weighted(case.build())
    options = case.options | {"bias": inputs.bias, "backend": backend}

    def run(hidden):
        if op == "weighted":
            arguments = (hidden, inputs.weight, inputs.targets, inputs.seq_weight, inputs.cu_seqlens)
            return weighted_log_likelihood(*arguments, **options)
        seen = log_likelihood(hidden, inputs.weight, inputs.targets, inputs.cu_seqlens, **options)
        return seen.sequence.sum(), seen

    wanted, plain = run(inputs.hidden)
    found, seen = checkpoint(run, inputs.hidden, use_reentrant=False)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, seen, plain))
    leaves = list(inputs.leaves.values())
    assert all(map(torch.equal, gradients(found, leaves), gradients(wanted, leaves)))


# ---- the barrier


@pytest.mark.parametrize("kind", [*CHECKPOINTS, *HOOKS])
@pytest.mark.parametrize("op", [relaxed_log_barrier, barrier_multiplier])
def test_barrier(op, kind):
    z = torch.tensor([-2.0, -1e-3, 0.5], dtype=torch.float64, requires_grad=True)

    def loss(z):
        return op(z, 0.3).sum()

    saved = partial(under_hooks, HOOKS[kind]()) if kind in HOOKS else CHECKPOINTS[kind]
    (wanted,) = gradients(loss(z), [z])
    assert torch.equal(gradients(saved(loss, z), [z])[0], wanted)
    if kind == "reentrant":
        return  # torch refuses torch.autograd.grad there
    (slope,) = torch.autograd.grad(loss(z), z, create_graph=True)
    (found,) = torch.autograd.grad(saved(loss, z), z, create_graph=True)
    assert torch.equal(found, slope)
    if op is relaxed_log_barrier:
        (curvature,) = torch.autograd.grad(slope.sum(), z)
        assert torch.equal(torch.autograd.grad(found.sum(), z)[0], curvature)
    else:
        with pytest.raises(RuntimeError, match="a third is not supported"):
            found.sum().backward()
