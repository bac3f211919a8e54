"""The host side of the GPU backends, on a CPU, with a row kernel in plain torch: order and cut of the rows, products, sums."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from head_cases import HEAD_BACKENDS, Case, Inputs, sequence_of
from head_oracle import assert_close_to_oracle
from torch import Tensor

from l3m_kernels import chunk_sizes, chunked, row_chunks
from l3m_kernels.chunk_sizes import gathered_rows
from l3m_kernels.row_order import Rows, ordered

NEEDS = (True, True, True)


def softmax_gradient(
    logits,
    targets,
    upstream,
    bias,
    softcap,
    inverse_temperature,
    grad_dtype,
    token,
    lse,
    flag,
    known_lse=False,
    out=None,
) -> None:
    """What `RowKernels` asks for, one torch op after the other."""
    z = logits if bias is None else logits + bias
    slope = 1.0
    if softcap:
        tanh = (z / softcap).tanh()
        z, slope = softcap * tanh, 1 - tanh.square()
    z = z * inverse_temperature
    here = (targets >= 0) & (targets < logits.shape[1])
    if not known_lse:
        z = z.masked_fill(~here[:, None], torch.nan)
        lse.copy_(z.logsumexp(1))
        token.copy_(z.gather(1, targets.where(here, 0)[:, None])[:, 0] - lse)
        flag.masked_fill_((~here).any(), 1)
    if upstream is not None:
        correct = torch.nn.functional.one_hot(targets.where(here, 0), logits.shape[1]) * here[:, None]
        gradient = upstream[:, None] * (correct - (z - lse[:, None]).exp()) * slope * inverse_temperature
        gradient = gradient.masked_fill((upstream == 0)[:, None], 0).to(grad_dtype)
        rows, stride = logits.shape[0], logits.stride(0)
        whole = logits.as_strided((rows, stride), (stride, 1))
        whole.fill_(torch.nan)  # nothing else of the row may be used
        (whole.view(grad_dtype) if out is None else out)[:, : logits.shape[1]] = gradient


KERNELS = row_chunks.RowKernels(softmax_gradient)
GATHERING = [KERNELS]
if "triton" in HEAD_BACKENDS:  # in its interpreter: `test_triton.py`
    from l3m_kernels import triton_ops

    GATHERING.append(row_chunks.RowKernels(triton_ops.softmax_gradient, triton_ops.sequence_sums))


def head_of(case: Case, inputs: Inputs, workspace: int, low_memory: bool) -> chunked.Head:
    weight, bias = inputs.weight.detach(), None if inputs.bias is None else inputs.bias.detach()
    return chunked.Head(weight, bias, case.softcap, case.temperature, workspace, low_memory)


def run(
    case: Case,
    inputs: Inputs,
    weighted: bool,
    workspace: int,
    low_memory: bool,
    scored: int | None = None,
    kernels: row_chunks.RowKernels = KERNELS,
) -> dict[str, Tensor]:
    hidden, targets = inputs.hidden.detach().reshape(-1, case.width), inputs.targets.reshape(-1).long()
    assert inputs.cu_seqlens is not None
    head, cu_seqlens = head_of(case, inputs, workspace, low_memory), inputs.cu_seqlens
    if weighted:
        arguments = (hidden, targets, inputs.seq_weight, cu_seqlens, head, case.ignore_index, NEEDS, scored)
        loss, sequence, _, token, *gradients = row_chunks.weighted_log_likelihood(kernels, *arguments)
        found = {"loss": loss, "sequence": sequence, "token": token}
    else:
        arguments = (hidden, targets, cu_seqlens, head, case.ignore_index, scored)
        sequence, _, token, lse = row_chunks.log_likelihood(kernels, *arguments)
        found = {"sequence": sequence, "token": token}
        upstream = (inputs.grad_sequence, inputs.grad_token.flatten())
        arguments = (hidden, targets, cu_seqlens, lse, head, case.ignore_index, NEEDS, scored)
        gradients = row_chunks.log_likelihood_backward(kernels, *upstream, *arguments)
    d_hidden, d_weight, d_bias = gradients
    found |= {"d_hidden": d_hidden.view(inputs.hidden.shape), "d_weight": d_weight}
    return found | ({"d_bias": d_bias} if case.bias else {})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("workspace", [40, 40_000, 120_000, 1 << 22])
@pytest.mark.parametrize("seed", range(6))
def test_oracle(seed, workspace, low_memory, weighted):
    """Chunks of one row too, but not hundreds of them: sums of sums have the error of a long sum."""
    large = seed % 2 == 0 and workspace > 40_000
    case = replace(Case.random(seed, large=large), dtype=torch.float32, padded=False, bias=True)
    inputs = case.build()
    found = run(case, inputs, weighted, workspace, low_memory)
    assert_close_to_oracle(case, inputs, found, weighted)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_block_of_the_vocabulary_has_its_own_bias(weighted):
    """Three blocks, of which no two have a bias alike."""
    case = Case.plain(dtype=torch.float32, vocabulary=5000, lengths=(3, 0, 4))
    inputs = case.build()
    assert_close_to_oracle(case, inputs, run(case, inputs, weighted, 1, low_memory=True), weighted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_without_compaction_unscored_rows_may_hold_anything(low_memory, weighted, monkeypatch):
    """As while a CUDA graph is captured: every row is computed, unscored ones and those of weight 0 leave no trace."""

    def all_rows(scored, gradient, given):
        count = len(scored)
        return Rows(torch.arange(count), 0 if gradient is None else count, count, False, idle=True)

    case = Case.plain(dtype=torch.float32, unscored=0.4, lengths=(30, 0, 41, 1))
    inputs = case.build()
    wanted = run(case, inputs, weighted, 5000, low_memory)
    with torch.no_grad():
        inputs.hidden[inputs.targets == case.ignore_index] = torch.nan
    monkeypatch.setattr(row_chunks, "ordered", all_rows)
    found = run(case, inputs, weighted, 5000, low_memory)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def gathered(monkeypatch):
    """Rows are few here; -> the numbers of rows whose gradients were gathered."""
    found = []

    def rows(scored, *sizes, **options):
        found.append(scored)
        return gathered_rows(scored, *sizes, **options)

    monkeypatch.setattr(chunk_sizes, "LEAST_GATHERED", 1)
    monkeypatch.setattr(row_chunks, "gathered_rows", rows)
    return found


@pytest.mark.parametrize("kernels", GATHERING, ids=["torch", "triton"][: len(GATHERING)])
@pytest.mark.parametrize("scored", ["counted", "given"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_all_rows_may_be_gathered(dtype, extras, weighted, scored, kernels, gathered):
    """A workspace that holds the 16-bit gradients of all rows and the logits of some; bf16 has the sum's memory too."""
    settings = {"softcap": 30.0, "temperature": 0.7} if extras else {"softcap": None, "temperature": 1.0}
    case = Case.plain(
        dtype=dtype, lengths=(30, 0, 41, 1), width=16, vocabulary=601, unscored=0.2, bias=extras, **settings
    )
    inputs = case.build()
    taken = inputs.targets != case.ignore_index
    count = int(taken.sum())
    if scored == "counted":  # rows without a gradient go through the logits alone
        upstream = inputs.grad_token + inputs.grad_sequence[sequence_of(inputs)]
        taken = taken & ((inputs.seq_weight[sequence_of(inputs)] if weighted else upstream) != 0)
    rows = int(taken.sum())
    wanted = rows * 2 * chunk_sizes.row_stride(601) + 10 * chunk_sizes.row_bytes(601, 16, 2)
    saved = 4 * 601 * 16 if dtype == torch.bfloat16 else 0
    found = run(case, inputs, weighted, wanted - saved, False, count if scored == "given" else None, kernels)
    assert gathered == [rows]
    assert_close_to_oracle(case, inputs, found, weighted, backend="triton")  # products of 16-bit numbers


def test_what_is_gathered_fits_where_the_sum_would_be():
    workspace, sum_bytes = 551_000_000, 4 * 4096 * 128256  # shape R
    options: dict[str, Any] = {"multiprocessors": 132, "workspace_bytes": workspace, "accumulator_bytes": sum_bytes}
    rows = gathered_rows(8192, 128256, 4096, **options)
    assert rows == 1024
    assert 8192 * 2 * 128256 + rows * chunk_sizes.row_bytes(128256, 4096, 2) <= workspace + sum_bytes
    assert gathered_rows(8192 + 1100, 128256, 4096, **options) == 0
    assert gathered_rows(8192, 128256, 4096, **options, itemsize=4) == 0


@pytest.mark.parametrize("exponent", [-40, -20, 0, 10])
def test_upstream_gradients_of_any_size_in_fp16(exponent):
    """1e-12 is no fp16 number: a power of two is taken out first, and comes back where fp32 can hold it."""
    case = Case.plain(dtype=torch.float16, softcap=None, lengths=(20, 30))
    inputs = case.build()
    plain = run(case, inputs, True, 1 << 20, False)
    small = run(case, inputs._replace(seq_weight=inputs.seq_weight * 2.0**exponent), True, 1 << 20, False)
    for name in ("d_hidden", "d_weight", "d_bias"):
        assert plain[name].dtype == torch.float32
        assert plain[name].abs().max() > 0
        assert torch.equal(small[name], plain[name] * 2.0**exponent)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000, 100_000])
@pytest.mark.parametrize("workspace", [1, 100_000, 1 << 20, 1 << 30])
def test_chunks_cover_the_rows_and_fit_the_workspace(workspace, count):
    targets, weight = torch.zeros(count, dtype=torch.int64), torch.zeros(100, 8)
    head = chunked.Head(weight, None, None, 1.0, workspace)
    rows = ordered(targets == 0, None)
    batch = row_chunks._Batch(KERNELS, torch.zeros(count, 8), targets, head, -100, rows)
    chunks = list(batch.chunks(0, count))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(count))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert all(size * 4 * chunk_sizes.row_stride(100) <= max(workspace, 4 * 128) for size in sizes)
    assert len(set(sizes[:-1])) <= 1


def test_rows_are_ordered_by_what_they_need():
    scored = torch.tensor([True, False, True, True, False, True])
    gradient = torch.tensor([False, True, True, False, False, True])
    rows = ordered(scored, gradient)
    assert rows.index.tolist() == [2, 5, 0, 3]
    assert (rows.gradient, rows.scored, rows.compact) == (2, 4, True)
