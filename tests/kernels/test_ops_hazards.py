"""What is wrong, missing or infinite in the head's inputs, and what each must give."""

import pytest
import torch
from head_calls import batch, both, call, loss_of
from head_cases import WEIGHTED_BACKENDS, grad_of
from head_oracle import multiplies_in
from torch import Tensor

from l3m_kernels import chunked, weighted_log_likelihood
from l3m_kernels.reference import eager_log_likelihood

# ---- targets outside the vocabulary


@both
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, 7, 8, -99, -101, 2**31 - 1, -(2**31)])
def test_target_outside_the_vocabulary(op, backend, value, dtype):
    arguments = batch()
    arguments["targets"][4] = value
    arguments["targets"] = arguments["targets"].to(dtype)
    with pytest.raises(IndexError, match=rf"{op}.*targets\[4\] = {value} is outside the vocabulary \[0, 7\)"):
        call(op, **arguments, backend=backend)


@both
def test_target_outside_the_vocabulary_padded_and_int64(op, backend):
    arguments = batch()
    targets = arguments["targets"].view(2, 3)
    targets[1, 2] = 2**40
    with pytest.raises(IndexError, match=rf"targets\[5\] = {2**40} "):
        call(op, arguments["hidden"].view(2, 3, -1), arguments["weight"], targets, backend=backend)


@both
def test_ignore_index_is_the_only_exception(op, backend):
    arguments = batch()
    arguments["targets"][4] = -100
    with pytest.raises(IndexError, match=r"targets\[4\] = -100 .* not ignore_index \(-1\)"):
        call(op, **arguments, ignore_index=-1, backend=backend)
    assert call(op, **arguments, backend=backend).length.tolist() == [2, 3]


@pytest.mark.parametrize("value", [-1, 7, 2**40])
def test_target_outside_the_vocabulary_where_values_are_not_looked_at(value):
    """On a GPU: the row is NaN, nothing is read out of bounds, and the other rows are what they would have been."""
    arguments = batch()
    hidden, weight, targets, cu_seqlens = arguments.values()
    head = chunked.Head(weight, None, None, 1.0, 1 << 20)
    _, _, clean, _ = chunked.log_likelihood(hidden, targets, cu_seqlens, head, -100)
    targets[4] = value
    needs, seq_weight = (True, True, False), torch.ones(2)
    sequence, length, token, lse = chunked.log_likelihood(hidden, targets, cu_seqlens, head, -100)
    d_hidden, *_ = chunked.log_likelihood_backward(
        torch.ones(2), torch.zeros(6), hidden, targets, cu_seqlens, lse, head, -100, needs
    )
    _, *same, d_hidden_weighted, _, _ = chunked.weighted_log_likelihood(
        hidden, targets, seq_weight, cu_seqlens, head, -100, needs
    )
    bad = torch.arange(6) == 4
    for statistics, d in (((sequence, length, token), d_hidden), (same, d_hidden_weighted)):
        assert torch.equal(statistics[2].isnan(), bad)
        assert torch.equal(statistics[2][~bad], clean[~bad])
        assert statistics[0].isnan().tolist() == [False, True]
        assert statistics[1].tolist() == [2, 4]
        assert torch.equal(d.isnan().any(1), bad)


# ---- infinite and NaN logits, as torch


def spoil(kind: str, hidden: Tensor, bias: Tensor, targets: Tensor) -> None:
    infinity = float("inf")
    if kind == "-inf bias, not a target":
        bias[0] = -infinity
        targets.clamp_(min=1)
    elif kind == "-inf bias, a target":
        bias[targets[2]] = -infinity
    elif kind == "all -inf":
        bias.fill_(-infinity)
    elif kind == "+inf bias":
        bias[3] = infinity
    elif kind == "NaN bias":
        bias[3] = torch.nan
    elif kind == "NaN hidden":
        hidden[2] = torch.nan
    elif kind == "inf hidden":
        hidden[2, 0] = infinity
    elif kind == "huge hidden":
        hidden[2] *= 1e30 if hidden.dtype != torch.float16 else 1e4


KINDS = (
    "-inf bias, not a target",
    "-inf bias, a target",
    "all -inf",
    "+inf bias",
    "NaN bias",
    "NaN hidden",
    "inf hidden",
    "huge hidden",
)


@both
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_and_nan_logits(op, backend, kind, dtype, softcap):
    hidden, weight, targets, cu_seqlens = batch(dtype=dtype).values()
    bias = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype)
    spoil(kind, hidden, bias, targets)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    seq_weight = torch.tensor([0.5, -2.0], dtype=compute)

    expected = [tensor.to(compute).requires_grad_() for tensor in (hidden, weight, bias)]
    token = eager_log_likelihood(expected[0], expected[1], targets, expected[2], softcap=softcap)
    (-(token[:2].sum() * seq_weight[0] + token[2:].sum() * seq_weight[1])).backward()

    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    options = {"bias": leaves[2], "softcap": softcap, "backend": backend}
    out = call(op, leaves[0], leaves[1], targets, cu_seqlens, seq_weight, **options)
    torch.testing.assert_close(out.token.detach(), token.detach(), equal_nan=True)
    loss_of(op, leaves[0], leaves[1], targets, cu_seqlens, seq_weight, **options).backward()
    # Both factors of a product are rounded to bf16, by 2^-9 of themselves: with |u| <= 2, hidden and weight up to 2.5.
    rounded = multiplies_in(backend, dtype) == torch.bfloat16
    for leaf, wanted in zip(leaves, expected, strict=True):
        size = grad_of(wanted).nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        relative, absolute = (2e-2, 2 * 2.5 * 2**-8 * max(size, 1.0)) if rounded else (None, None)
        torch.testing.assert_close(
            grad_of(leaf), grad_of(wanted).to(dtype), equal_nan=True, rtol=relative, atol=absolute
        )
    if kind == "-inf bias, not a target":
        assert grad_of(leaves[2])[0] == 0
    if kind == "NaN hidden":
        assert torch.equal(out.token.isnan(), torch.arange(6) == 2)
        assert out.sequence.isnan().tolist() == [False, True]
        assert torch.equal(grad_of(leaves[0]).isnan().any(1), torch.arange(6) == 2)


@both
def test_unscored_rows_may_hold_anything(op, backend):
    hidden, weight, targets, cu_seqlens = batch().values()
    targets[[1, 5]] = -100
    seq_weight = torch.tensor([1.5, -0.5])
    results = []
    for garbage in (0.0, torch.nan, float("inf")):
        rows = hidden.clone()
        rows[[1, 5]] = garbage
        leaves = [rows.requires_grad_(), weight.clone().requires_grad_()]
        loss = loss_of(op, leaves[0], leaves[1], targets, cu_seqlens, seq_weight, backend=backend)
        loss.backward()
        results.append((loss.detach(), grad_of(leaves[0]), grad_of(leaves[1])))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_token_that_no_row_can_choose_has_no_gradient(op, backend, dtype):
    """A row of the weight that is -inf, for hidden states that are positive: nothing of what fills a tile up may meet it."""
    arguments = batch(dtype=dtype)
    arguments["hidden"].abs_().clamp_(min=0.1)
    arguments["weight"][3] = -torch.inf
    arguments["targets"][arguments["targets"] == 3] = 2
    arguments["weight"].requires_grad_()
    loss_of(op, **arguments, seq_weight=torch.tensor([1.0, -0.5]), backend=backend).backward()
    gradient = grad_of(arguments["weight"])
    assert gradient.isfinite().all()
    assert not gradient[3].any()
    assert gradient.any()


@pytest.mark.parametrize("garbage", [torch.nan, float("inf")])
@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
def test_sequence_of_weight_zero_is_dropped_whatever_its_likelihood(backend, garbage):
    hidden, weight, targets, cu_seqlens = batch().values()
    hidden[:2] = garbage
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    seq_weight = torch.tensor([0.0, 2.0])
    loss, out = weighted_log_likelihood(leaves[0], leaves[1], targets, seq_weight, cu_seqlens, backend=backend)
    loss.backward()
    assert out.sequence.isnan().tolist() == [True, False]
    assert loss == -2 * out.sequence[1]
    assert all(bool(grad_of(leaf).isfinite().all()) for leaf in leaves)
    assert not grad_of(leaves[0])[:2].any()
