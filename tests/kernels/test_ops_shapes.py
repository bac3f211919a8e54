"""Long, empty, tiny, strided and huge inputs of the head's ops."""

import math
import os

import pytest
import torch
from head_calls import batch, both, call, loss_of
from head_cases import VIEWS, grad_of, view

from l3m_kernels import log_likelihood, set_workspace, weighted_log_likelihood
from l3m_kernels.reference import eager_log_likelihood

# ---- sums


@both
@pytest.mark.parametrize("tokens", [4096, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_sums(op, backend, dtype, tokens):
    """4,096 times -2.03 is -8,315, in bf16 it would be -1,024."""
    logit = math.log(math.exp(-2.03) / (1 - math.exp(-2.03)))
    weight = torch.tensor([[logit], [0.0]], dtype=dtype)
    hidden, targets = torch.ones(tokens, 1, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    out = call(op, hidden, weight, targets, torch.tensor([0, tokens]), backend=backend)
    exact = weight.double()[:, 0].log_softmax(0)[0].item()
    assert out.token[0].item() == pytest.approx(-2.03, abs=2e-2)
    assert out.sequence.item() == pytest.approx(tokens * exact, rel=2e-7)
    assert out.sequence.item() == pytest.approx(out.token.double().sum().item(), rel=6e-8)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_not_biased(op, backend, dtype):
    """The signed error over 10,000 rows has a mean under a tenth of its spread, in the log-likelihoods and in d_hidden."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(10_000, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(64, 16, generator=generator).to(dtype)
    targets = torch.randint(64, (10_000,), generator=generator)
    cu_seqlens, seq_weight = torch.arange(0, 10_001, 10), torch.full((1000,), 0.01)
    out = call(op, hidden, weight, targets, cu_seqlens, seq_weight, backend=backend)
    loss_of(op, hidden, weight, targets, cu_seqlens, seq_weight, backend=backend).backward()
    exact = hidden.detach().double().requires_grad_()
    token = eager_log_likelihood(exact, weight.double(), targets)
    (-0.01 * token.sum()).backward()
    for value, truth in ((out.token, token), (grad_of(hidden), grad_of(exact))):
        error = (value.double() - truth).detach()
        assert 0 < error.abs().max() < 1e-3
        assert error.mean().abs() < 0.1 * error.std()


# ---- empty and tiny batches


@both
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ((0, 4), [0]),
        ((0, 4), [0, 0, 0]),
        ((5, 4), [0, 2, 2, 5]),
        ((3, 0), [0, 3]),
        ((0, 3, 4), None),
        ((2, 0, 4), None),
        ((2, 3, 4), None),
        ((2, 3, 0), None),
    ],
)
def test_nothing_scored(op, backend, shape, offsets, dtype, bias):
    hidden = torch.randn(shape, dtype=dtype).requires_grad_()
    weight = torch.randn(7, shape[-1], dtype=dtype).requires_grad_()
    targets = torch.full(shape[:-1], -100)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    sequences = shape[0] if offsets is None else len(offsets) - 1
    vector = torch.zeros(7, dtype=dtype).requires_grad_() if bias else None
    out = call(op, hidden, weight, targets, cu_seqlens, bias=vector, backend=backend)
    assert out.sequence.tolist() == [0.0] * sequences
    assert out.length.tolist() == [0] * sequences
    assert out.token.shape == targets.shape
    assert not out.token.any()
    loss = loss_of(op, hidden, weight, targets, cu_seqlens, torch.ones(sequences), bias=vector, backend=backend)
    loss.backward()
    assert loss == 0
    for leaf in (hidden, weight, vector):
        if leaf is not None:
            assert grad_of(leaf).shape == leaf.shape
            assert not grad_of(leaf).any()


@both
def test_no_hidden_size(op, backend):
    """D = 0 leaves the bias alone."""
    bias = torch.tensor([0.0, 1.0, 2.0])
    out = call(
        op, torch.zeros(2, 0), torch.zeros(3, 0), torch.tensor([1, 2]), torch.tensor([0, 2]), bias=bias, backend=backend
    )
    torch.testing.assert_close(out.token, bias.log_softmax(0)[1:])


@both
def test_one_word_vocabulary(op, backend):
    """log 1 = 0 for each token, and no gradient."""
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    targets, cu_seqlens = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 1, 4])
    out = call(op, hidden, weight, targets, cu_seqlens, backend=backend)
    assert not out.token.any()
    assert out.length.tolist() == [1, 0, 3]
    loss_of(op, hidden, weight, targets, cu_seqlens, torch.ones(3), backend=backend).backward()
    assert not grad_of(hidden).any()
    assert not grad_of(weight).any()


# ---- layouts


@both
@pytest.mark.parametrize("layout", VIEWS)
def test_views_of_indices_and_upstream(op, backend, layout):
    """The same bits from views of everything that is not multiplied."""
    hidden, weight, targets, _ = batch(tokens=12).values()
    weight.requires_grad_()
    cu_seqlens, seq_weight = torch.tensor([0, 4, 8, 12]), torch.tensor([0.5, 0.5, 0.5])
    if layout == "expanded":
        targets = targets[:1].expand(12)
    plain = (hidden.clone(), targets.clone(), cu_seqlens, seq_weight)
    shift = view(cu_seqlens, "offset" if layout == "expanded" else layout)
    viewed = (view(hidden, "contiguous" if layout == "expanded" else layout), view(targets, layout), shift)
    results = []
    for rows, wanted, offsets, scale in (plain, (*viewed, view(seq_weight, layout))):
        loss = loss_of(op, rows, weight, wanted, offsets, scale, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, weight)))
    assert all(map(torch.equal, *results))


@both
def test_padded_equals_packed(op, backend):
    hidden, weight, targets, _ = batch(tokens=12).values()
    targets[[3, 6, 7]] = -100  # the padding of (3, 4)
    padded = call(op, hidden.view(3, 4, -1), weight, targets.view(3, 4), backend=backend)
    packed = call(op, hidden, weight, targets, torch.tensor([0, 4, 8, 12]), backend=backend)
    rows = torch.tensor([0, 1, 2, 4, 5, 8, 9, 10, 11])
    dense = call(op, hidden[rows], weight, targets[rows], torch.tensor([0, 3, 5, 9]), backend=backend)
    assert torch.equal(padded.token.flatten(), packed.token)
    torch.testing.assert_close(dense.token, packed.token[rows], rtol=1e-6, atol=1e-6)
    for other in (packed, dense):
        assert torch.equal(padded.length, other.length)
        torch.testing.assert_close(padded.sequence, other.sequence, rtol=1e-6, atol=1e-6)


# ---- addresses beyond 2^31


@both
def test_rows_of_a_large_batch_of_which_few_are_scored(op, backend):
    """T x V > 2^31, at no cost: unscored rows are dropped before the first product."""
    tokens, vocabulary = 600_000, 4096
    assert tokens * vocabulary > 2**31
    hidden, weight = torch.zeros(tokens, 1), torch.randn(vocabulary, 1, generator=torch.Generator().manual_seed(3))
    targets = torch.full((tokens,), -100)
    hidden[-3:], targets[-3:] = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([0, 4095, 7])
    hidden.requires_grad_()
    arguments = (hidden, weight, targets, torch.tensor([0, tokens - 2, tokens]))
    out = call(op, *arguments, backend=backend)
    exact = hidden.detach()[-3:].double().requires_grad_()
    token = eager_log_likelihood(exact, weight.double(), targets[-3:])
    torch.testing.assert_close(out.token[-3:].double(), token, rtol=1e-6, atol=1e-6)
    assert out.length.tolist() == [1, 2]
    loss_of(op, *arguments, torch.tensor([1.0, 3.0]), backend=backend).backward()
    (-(token * torch.tensor([1, 3, 3])).sum()).backward()
    torch.testing.assert_close(grad_of(hidden)[-3:].double(), grad_of(exact), rtol=1e-6, atol=1e-6)
    assert not grad_of(hidden)[:-3].any()


@pytest.mark.slow
@both
@pytest.mark.parametrize("workspace", [None, 10 << 30])
def test_logits_beyond_two_to_the_31(op, backend, workspace):
    """16,760 rows at V = 128,256, in chunks of the default workspace and in one chunk of 8.6 GB."""
    if workspace and os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16 << 30:
        pytest.skip("needs 16 GB of memory")
    vocabulary, tokens = 128_256, 16_760
    assert tokens * vocabulary > 2**31
    set_workspace(workspace)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 2, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 2, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[-1] = vocabulary - 1
    cu_seqlens, seq_weight = torch.tensor([0, tokens - 5, tokens]), torch.tensor([1.0, -2.0])
    arguments = (hidden, weight, targets)
    if op == "log_likelihood":
        out = log_likelihood(*arguments, cu_seqlens, backend=backend)
        loss = -(out.sequence * seq_weight).sum()
    else:
        loss, out = weighted_log_likelihood(*arguments, seq_weight, cu_seqlens, backend=backend)
    loss.backward()
    rows = torch.tensor([0, 8000, 16743, 16744, 16745, tokens - 6, tokens - 5, tokens - 1])
    exact = hidden.detach()[rows].double().requires_grad_()
    wanted = eager_log_likelihood(exact, weight.double(), targets[rows])
    torch.testing.assert_close(out.token[rows].detach().double(), wanted.detach(), rtol=1e-6, atol=2e-6)
    (-(wanted * torch.where(rows < tokens - 5, 1.0, -2.0)).sum()).backward()
    # A sum of 128,256 products in fp32, in the order of the BLAS.
    torch.testing.assert_close(grad_of(hidden)[rows].double(), grad_of(exact), rtol=0, atol=1e-3)
