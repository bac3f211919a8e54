"""`scored`, the number of scored rows that the caller knows: no wait for the device, the same results, and never a wrong one unnoticed."""

from dataclasses import replace

import pytest
import torch
from head_calls import batch, both, call, loss_of
from head_cases import Case, Inputs
from head_oracle import assert_close_to_oracle
from test_ops_compile import Model, loss_and_gradients
from test_ops_compile import batch as padded_batch
from test_row_chunks import NEEDS, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from l3m_kernels import chunked, device_flags, log_likelihood, row_chunks, weighted_log_likelihood
from l3m_kernels.row_order import ordered

of_driver = pytest.mark.parametrize("weighted", [False, True])
low_memory_too = pytest.mark.parametrize("low_memory", [False, True])


def count_of(case: Case, inputs: Inputs) -> int:
    return int((inputs.targets != case.ignore_index).sum())


# ---- the driver, with a row kernel in plain torch


@of_driver
@low_memory_too
@pytest.mark.parametrize("workspace", [40_000, 1 << 22])
@pytest.mark.parametrize("seed", range(12))
def test_oracle(seed, workspace, low_memory, weighted):
    """A third of the sequences have weight 0, with some seeds nothing is scored: `Case.random`."""
    case = replace(Case.random(seed, large=seed % 2 == 0 and workspace > 40_000), padded=False, bias=True)
    case = replace(case, dtype=torch.float32 if case.dtype == torch.float64 else case.dtype)
    inputs = case.build()
    found = run(case, inputs, weighted, workspace, low_memory, count_of(case, inputs))
    assert_close_to_oracle(case, inputs, found, weighted, "triton")  # for its gradients of logits in 16 bits


@of_driver
@low_memory_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bits_of_counted_rows_where_all_have_a_gradient(dtype, low_memory, weighted):
    case = Case.plain(dtype=dtype, unscored=0.4, lengths=(300, 0, 410, 1), vocabulary=50)
    inputs = case.build()
    inputs = inputs._replace(seq_weight=torch.ones(4), grad_sequence=torch.ones(4), grad_token=torch.ones(711))
    counted = run(case, inputs, weighted, 1 << 16, low_memory)
    given = run(case, inputs, weighted, 1 << 16, low_memory, count_of(case, inputs))
    assert [name for name, value in counted.items() if not torch.equal(value, given[name])] == []


@of_driver
@low_memory_too
@pytest.mark.parametrize("unscored", [0.0, 0.4, 1.0])
def test_rows_of_weight_0_may_hold_anything(unscored, low_memory, weighted):
    """NaN hidden states under an upstream gradient of 0 leave no trace in the gradients, nor do unscored rows."""
    case = Case.plain(dtype=torch.float32, unscored=unscored, lengths=(30, 0, 41, 1))
    inputs = case.build()
    for upstream in (inputs.seq_weight, inputs.grad_sequence):
        upstream[0] = 0
    inputs.grad_token[:30] = 0
    wanted = run(case, inputs, weighted, 5000, low_memory)
    with torch.no_grad():
        inputs.hidden[:30] = torch.nan
        inputs.hidden[inputs.targets == case.ignore_index] = torch.nan
    found = run(case, inputs, weighted, 5000, low_memory, count_of(case, inputs))
    for name in ("loss", "d_hidden", "d_weight", "d_bias"):
        if name in wanted:
            torch.testing.assert_close(found[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    assert bool(found["token"][30:].isfinite().all())


@of_driver
@low_memory_too
@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wrong", [-1000, -1, 1, 1000])
def test_a_wrong_count_makes_all_results_nan_and_sets_its_flag(
    wrong, dtype, ignore_index, low_memory, weighted, monkeypatch
):
    """As on a GPU, where nobody has looked before. In both directions, to none and to all rows; no index out of bounds."""
    case = Case.plain(dtype=dtype, unscored=0.3, lengths=(30, 41, 1), ignore_index=ignore_index)
    inputs = case.build()
    flags = {name: torch.zeros(1, dtype=torch.int32) for name in device_flags.FAULTS}
    monkeypatch.setattr(device_flags, "flag", lambda device, fault: flags[fault])
    right = count_of(case, inputs)
    assert 0 < right < len(inputs.targets)
    found = run(case, inputs, weighted, 5000, low_memory, right)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert [int(flag) for flag in flags.values()] == [0, 0, 0]
    found = run(case, inputs, weighted, 5000, low_memory, min(max(right + wrong, 0), len(inputs.targets)))
    assert [name for name, value in found.items() if not value.isnan().all()] == []
    assert {name: int(flag) for name, flag in flags.items()} == {"targets": 0, "scored": 1, "cu_seqlens": 0}


def test_rows_are_ordered_by_what_they_need():
    scored = torch.tensor([True, False, True, True, False, True])
    gradient = torch.tensor([False, True, True, False, False, True])
    rows = ordered(scored, gradient, 4)
    assert rows.index.tolist() == [2, 5, 0, 3]
    assert (rows.gradient, rows.scored, rows.compact, rows.idle) == (4, 4, True, True)
    assert ordered(scored, None, 4).gradient == 0


# ---- nothing waits: tensors without values cannot be asked for any


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_counting_needs_values():
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        ordered(meta(9, dtype=torch.bool), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [NEEDS, (True, False, False), (False, False, False)])
@low_memory_too
def test_with_a_count_no_value_is_asked_for(low_memory, needs, dtype):
    """All of the host's side of a call, forward and backward: .tolist(), .item() and bool() raise on these tensors."""

    def sums(token, targets, cu_seqlens, ignore_index):
        return token.new_empty(len(cu_seqlens) - 1), targets.new_empty(len(cu_seqlens) - 1)

    kernels = row_chunks.RowKernels(lambda *arguments, **options: None, sums)
    head = chunked.Head(meta(50, 8, dtype=dtype), meta(50, dtype=dtype), 3.0, 0.7, 40_000, low_memory)
    hidden, targets = meta(500, 8, dtype=dtype), meta(500, dtype=torch.int64)
    cu_seqlens = meta(4, dtype=torch.int64)
    _, _, token, lse = row_chunks.log_likelihood(kernels, hidden, targets, cu_seqlens, head, -100, 300)
    arguments = (meta(3), meta(500), hidden, targets, cu_seqlens, lse, head, -100, needs, 300)
    gradients = row_chunks.log_likelihood_backward(kernels, *arguments)
    arguments = (hidden, targets, meta(3), cu_seqlens, head, -100, needs, 300)
    _, _, _, same, *weighted = row_chunks.weighted_log_likelihood(kernels, *arguments)
    assert token.shape == same.shape == (500,)
    for found in (gradients, weighted):
        for gradient, shape, need in zip(found, ((500, 8), (50, 8), (50,)), needs, strict=True):
            assert gradient.shape == (shape if need else (0,))


# ---- the public functions, on a CPU


@both
@pytest.mark.parametrize("padded", [False, True])
def test_changes_nothing_on_a_cpu(op, backend, padded):
    arguments = batch(dtype=torch.float32)
    arguments["targets"][[0, 4]] = -100
    if padded:
        del arguments["cu_seqlens"]
        arguments |= {name: arguments[name].unflatten(0, (2, 3)) for name in ("hidden", "targets")}
    results = []
    for options in ({}, {"scored": 4}):
        hidden, weight = (arguments[name].clone().requires_grad_() for name in ("hidden", "weight"))
        rest = (arguments["targets"], arguments.get("cu_seqlens"), torch.tensor([1.0, -2.0]))
        loss = loss_of(op, hidden, weight, *rest, backend=backend, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for plain, given in zip(*results, strict=True):
        assert torch.equal(plain, given)


@both
@pytest.mark.parametrize("wrong", [-1, 0, 3, 5, 6, 7, 2**40])
def test_a_wrong_count_is_refused(op, backend, wrong):
    arguments = batch()
    arguments["targets"][[0, 4]] = -100
    wanted = r"scored must be 4, the number of targets other than ignore_index \(-100\)"
    if not 0 <= wrong <= 6:
        wanted = r"scored must be in \[0, T = 6\], the number of rows"
    with pytest.raises(ValueError, match=rf"{op}.*: {wanted}, got {wrong}$"):
        call(op, **arguments, scored=wrong, backend=backend)


@both
def test_nothing_scored(op, backend):
    arguments = batch()
    arguments["targets"].fill_(-100)
    assert call(op, **arguments, scored=0, backend=backend).sequence.tolist() == [0, 0]


@both
def test_fullgraph(op, backend):
    """The count differs from batch to batch, and the code is compiled once for all of them."""
    torch.compiler.reset()
    model = Model(op, backend)
    counter = CompileCounterWithBackend("aot_eager")

    def plain(inputs: Tensor, targets: Tensor, seq_weight: Tensor, scored: int) -> Tensor:
        hidden = model.layer(inputs).tanh()
        arguments = (hidden, model.head.weight, targets)
        options = {"bias": model.head.bias, "backend": backend, "scored": scored}
        if op == "weighted":
            return weighted_log_likelihood(*arguments, seq_weight, **options)[0]
        out = log_likelihood(*arguments, **options)
        return -(seq_weight * out.sequence).sum() + out.token.square().mean()

    compiled = torch.compile(plain, fullgraph=True, backend=counter)
    for sequences, length in ((3, 5), (4, 7), (6, 2), (5, 11)):
        arguments = (*padded_batch(sequences, length, packed=False), sequences * length - 1)
        wanted = loss_and_gradients(plain, model, arguments)
        torch.testing.assert_close(loss_and_gradients(compiled, model, arguments), wanted, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2
    torch.compiler.reset()
