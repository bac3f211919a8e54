"""The head's ops on random cases against the float64 oracle; what is drawn and how near it has to be is in `head_cases`."""

import pytest
import torch
from head_cases import (
    HEAD_BACKENDS,
    WEIGHTED_BACKENDS,
    Case,
    Inputs,
    grad_of,
    sequence_of,
)
from head_oracle import assert_close_to_oracle
from torch import Tensor

from l3m_kernels import LogLikelihood, log_likelihood, set_workspace, weighted_log_likelihood

SEEDS = [*range(400), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1000, 3000))]


def check_statistics(case: Case, inputs: Inputs, out: LogLikelihood) -> dict[str, Tensor]:
    """Shapes, dtypes, lengths and what is exact; -> the values to compare with the oracle."""
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    sequences = len(inputs.seq_weight)
    assert out.sequence.shape == out.length.shape == (sequences,)
    assert out.token.shape == inputs.targets.shape
    assert out.sequence.dtype == out.token.dtype == compute
    scored = inputs.targets != case.ignore_index
    lengths = torch.zeros(sequences, dtype=torch.int64).index_add(0, sequence_of(inputs), scored.flatten().long())
    assert torch.equal(out.length, lengths)
    assert not out.token[~scored].any()
    assert not out.sequence[lengths == 0].any()
    assert bool((out.token <= 0).all())
    return {"sequence": out.sequence.detach(), "token": out.token.detach()}


def check_gradients(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Shapes, dtypes and what is exact; -> the values to compare with the oracle."""
    for name, leaf in inputs.leaves.items():
        assert (leaf.grad is None) == (name in case.frozen), name
    grads = {name: leaf.grad for name, leaf in inputs.leaves.items() if leaf.grad is not None}
    for name, grad in grads.items():
        assert grad.dtype == case.dtype
        assert grad.shape == inputs.leaves[name].shape
    if "hidden" in grads:
        assert not grads["hidden"][inputs.targets == case.ignore_index].any()
    return {f"d_{name}": grad for name, grad in grads.items()}


def check(backend: str, case: Case, op: str) -> float:
    """One call of `op`, forward and backward -> the worst error, as a share of what is allowed."""
    inputs = case.build()
    hidden, weight, targets, cu_seqlens, bias, seq_weight = inputs[:6]
    options = {"bias": bias, "backend": backend, **case.options}
    if case.seed % 2:
        options["scored"] = int((targets != case.ignore_index).sum())
    if op == "weighted":
        loss, out = weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, **options)
        found = {"loss": loss.detach()} | check_statistics(case, inputs, out)
        assert loss.shape == ()
        assert loss.dtype == out.sequence.dtype
        assert not out.sequence.requires_grad
        assert not out.token.requires_grad
        assert loss.requires_grad == any(leaf.requires_grad for leaf in inputs.leaves.values())
        differentiated = (loss,) if loss.requires_grad else ()
        upstream = (loss.new_tensor(case.loss_scale),)
    else:
        out = log_likelihood(hidden, weight, targets, cu_seqlens, **options)
        found = check_statistics(case, inputs, out)
        assert out.sequence.requires_grad == any(leaf.requires_grad for leaf in inputs.leaves.values())
        differentiated = (out.sequence, out.token) if out.sequence.requires_grad else ()
        upstream = (inputs.grad_sequence * case.loss_scale, inputs.grad_token * case.loss_scale)
        chosen = {"sequence": slice(1), "token": slice(1, 2), "sum": slice(1)}.get(case.differentiated, slice(2))
        differentiated, upstream = differentiated[chosen], upstream[chosen]
        if differentiated and case.differentiated == "sum":
            differentiated, upstream = (out.sequence.sum(),), (out.sequence.new_tensor(case.loss_scale),)
    if differentiated:
        torch.autograd.backward(differentiated, upstream, retain_graph=case.twice)
    found |= check_gradients(case, inputs)
    if differentiated and case.twice:
        leaves = [leaf for leaf in inputs.leaves.values() if leaf.requires_grad]
        again = torch.autograd.grad(differentiated, leaves, upstream)
        assert all(torch.equal(grad_of(leaf), grad) for leaf, grad in zip(leaves, again, strict=True)), (
            "a second backward"
        )
    return max(assert_close_to_oracle(case, inputs, found, weighted=op == "weighted", backend=backend).values())


@pytest.mark.parametrize("backend", HEAD_BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_log_likelihood(seed, backend):
    case = Case.random(seed)
    set_workspace(case.workspace)
    check(backend, case, "log_likelihood")


@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_weighted_log_likelihood(seed, backend):
    case = Case.random(seed)
    set_workspace(case.workspace)
    check(backend, case, "weighted")


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", HEAD_BACKENDS)
def test_gradients_are_rounded_to_even(backend, weighted, dtype, bits):
    """Two equally likely tokens: d hidden = (W[0] - W[1]) / 2, exactly between two neighbours, of which the even one is wanted."""
    ulp = 2.0**-bits
    for above, wanted in ((ulp, 1.0), (3 * ulp, 1 + 2 * ulp)):
        hidden = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
        weight = torch.tensor([[2.0, 0.0], [-above, 0.0]], dtype=dtype)
        targets, ends = torch.tensor([0]), torch.tensor([0, 1])
        if weighted:
            loss = weighted_log_likelihood(hidden, weight, targets, torch.ones(1), ends, backend=backend)[0]
        else:
            loss = -log_likelihood(hidden, weight, targets, ends, backend=backend).sequence.sum()
        loss.backward()
        assert grad_of(hidden)[0, 0] == -wanted
