"""The Triton kernels themselves, in Triton's interpreter: memory around them, flags, infinities, the barrier's bits.

Runs where TRITON_INTERPRET=1; `test_triton.py` starts such a process.
"""

import math
import sys

import numpy
import pytest
import torch
import triton
import triton.language as tl
from barrier_problems import bits, fresh_state, random_problem
from head_cases import HEAD_BACKENDS
from test_row_chunks import softmax_gradient as plain
from torch import Tensor

from l3m_kernels import chunked, reference, row_chunks

if "triton" not in HEAD_BACKENDS:
    pytest.skip("the kernels run in the interpreter only where TRITON_INTERPRET=1", allow_module_level=True)

from l3m_kernels import triton_ops
from l3m_kernels.triton_ops.barrier import barrier_multiplier
from l3m_kernels.triton_ops.configs import Config

SENTINEL = 12345.0
OUTSIDE = (-1, -(2**40), 2**31, 2**40, 2**62, 2**32 + 3, 3 - 2**32)  # the last ones are 3 in 32 bits
softmax_module = sys.modules["l3m_kernels.triton_ops.softmax_gradient"]


@pytest.fixture(params=[32, None])
def block(request, monkeypatch):
    """Rows of several blocks, and the configuration of a GPU."""
    if request.param:
        monkeypatch.setattr(softmax_module, "for_rows", lambda *_: Config(request.param, 1))


class Guarded:
    """Arguments of `softmax_gradient` in the middle of larger buffers: what is around them is what a mistake would read or write."""

    def __init__(self, rows: int, vocabulary: int, stride: int, guard: float, dtype=torch.float32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.guard, self.vocabulary, self.edges = guard, vocabulary, []
        self.whole = self.inside(torch.full((rows * stride,), torch.nan))
        self.logits = self.whole.view(rows, stride)[:, :vocabulary]
        self.logits.copy_(3 * torch.randn(rows, vocabulary, generator=generator))
        self.targets = torch.randint(vocabulary, (rows,), generator=generator)
        self.upstream = self.inside(torch.randn(rows, generator=generator))
        self.bias = self.inside(torch.randn(vocabulary, generator=generator).to(dtype))
        self.token, self.lse = (self.inside(torch.full((rows,), torch.nan)) for _ in range(2))
        self.flag = torch.zeros(1, dtype=torch.int32)

    def inside(self, values: Tensor) -> Tensor:
        buffer = torch.full((len(values) + 8192,), self.guard).to(values.dtype)
        self.edges += [buffer[:4096], buffer[4096 + len(values) :]]
        buffer[4096 : 4096 + len(values)] = values
        return buffer[4096 : 4096 + len(values)]

    def run(self, kernel, grad_dtype, softcap=0.0, temperature=1.0, known_lse=False, gradient=True) -> Tensor:
        """-> the gradient (n, V)"""
        kernel(
            self.logits,
            self.targets,
            self.upstream if gradient else None,
            self.bias,
            softcap,
            1 / temperature,
            grad_dtype,
            None if known_lse else self.token,
            self.lse,
            self.flag,
            known_lse,
        )
        rows, stride = len(self.logits), self.logits.stride(0)
        return self.whole.view(rows, stride).view(grad_dtype)[:, : self.vocabulary].float()

    def untouched(self) -> bool:
        wanted = torch.tensor(self.guard)
        return all(
            torch.equal(edge.float().nan_to_num(7), wanted.to(edge.dtype).float().nan_to_num(7).expand_as(edge))
            for edge in self.edges
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "stride"), [(1, 1), (1, 32), (31, 31), (33, 64), (257, 257), (300, 320)])
@pytest.mark.parametrize(("softcap", "guard"), [(0.0, torch.nan), (5.0, SENTINEL)])
def test_against_torch_in_guarded_buffers(vocabulary, stride, dtype, guard, softcap, block):
    """Odd sizes, rows that follow each other without a gap, and nothing read or written around them."""
    found, wanted = (Guarded(5, vocabulary, stride, guard, dtype) for _ in range(2))
    gradients = [
        case.run(kernel, dtype, softcap, 0.7)
        for case, kernel in ((found, triton_ops.softmax_gradient), (wanted, plain))
    ]
    assert found.untouched()
    assert not found.flag.any()
    torch.testing.assert_close(found.token, wanted.token, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(found.lse, wanted.lse, rtol=1e-5, atol=3e-6)
    relative = {torch.float32: 3e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(*gradients, rtol=relative, atol=1e-6)


@pytest.mark.parametrize("guard", [torch.nan, SENTINEL])
@pytest.mark.parametrize("target", [*OUTSIDE, 40, 41, 1000])
def test_target_outside_the_vocabulary_is_never_an_access(target, guard, block):
    """Its row is NaN, as nothing that lies there is, and the flag is set; nothing of it shows in other rows."""
    case, clean = Guarded(4, 40, 40, guard), Guarded(4, 40, 40, guard)
    case.targets[2] = target
    gradient = case.run(triton_ops.softmax_gradient, torch.bfloat16)
    expected = clean.run(triton_ops.softmax_gradient, torch.bfloat16)
    bad = torch.arange(4) == 2
    assert case.untouched()
    assert case.flag.tolist() == [1]
    assert torch.equal(case.token.isnan(), bad)
    assert torch.equal(case.lse.isnan(), bad)
    assert gradient[2].isnan().all()
    assert torch.equal(gradient[~bad], expected[~bad])


@pytest.mark.parametrize("target", [-1, 40, 2**40, 2**32 + 3])
def test_target_in_another_part_of_the_vocabulary(target, block):
    """With the lse known, columns may be a part: no flag, and a row without a target's term."""
    case, wanted = (Guarded(3, 40, 64, SENTINEL) for _ in range(2))
    for one in (case, wanted):
        one.targets[1] = target
        one.lse.copy_(torch.tensor([4.0, 5.0, torch.nan]))
        one.upstream[2] = 1.0
    found = case.run(triton_ops.softmax_gradient, torch.float32, known_lse=True)
    torch.testing.assert_close(found, wanted.run(plain, torch.float32, known_lse=True), equal_nan=True)
    assert case.untouched()
    assert not case.flag.any()
    assert found[2].isnan().all()
    assert bool((found[1] * -case.upstream[1] > 0).all())


def test_target_outside_through_the_host_side():
    """What a GPU would give where no host looks at the values: rows of NaN in token and gradients, of one sequence."""
    kernels = row_chunks.RowKernels(triton_ops.softmax_gradient, triton_ops.sequence_sums)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=generator), torch.randn(7, 4, generator=generator)
    targets, cu_seqlens = torch.tensor([1, 6, 0, 2, 7, 3]), torch.tensor([0, 2, 6])
    bad, needs = targets == 7, (True, True, False)
    for low_memory in (False, True):
        head = chunked.Head(weight, None, None, 1.0, 1 << 20, low_memory)
        sequence, length, token, lse = row_chunks.log_likelihood(kernels, hidden, targets, cu_seqlens, head, -100)
        upstream = (torch.ones(2), torch.zeros(6))
        d_hidden, *_ = row_chunks.log_likelihood_backward(
            kernels, *upstream, hidden, targets, cu_seqlens, lse, head, -100, needs
        )
        _, *same, d_weighted, _, _ = row_chunks.weighted_log_likelihood(
            kernels, hidden, targets, torch.ones(2), cu_seqlens, head, -100, needs
        )
        for statistics, d in (((sequence, length, token), d_hidden), (same, d_weighted)):
            assert torch.equal(statistics[2].isnan(), bad)
            assert statistics[0].isnan().tolist() == [False, True]
            assert statistics[1].tolist() == [2, 4]
            assert torch.equal(d.isnan().any(1), bad)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("count", [0, 3, 5, 6])
def test_a_wrong_count_through_the_host_side(count, low_memory):
    """What a GPU would give: NaN in all results, whatever the kernels were told to compute."""
    kernels = row_chunks.RowKernels(triton_ops.softmax_gradient, triton_ops.sequence_sums)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=generator), torch.randn(7, 4, generator=generator)
    targets, cu_seqlens = torch.tensor([1, -100, 0, 2, -100, 3]), torch.tensor([0, 2, 6])
    head = chunked.Head(weight, torch.zeros(7), None, 1.0, 1 << 20, low_memory)
    needs, upstream = (True, True, True), (torch.tensor([1.0, 0.0]), torch.zeros(6))
    for given in (4, count):
        batch = (hidden, targets, cu_seqlens)
        sequence, _, token, lse = row_chunks.log_likelihood(kernels, *batch, head, -100, given)
        gradients = row_chunks.log_likelihood_backward(kernels, *upstream, *batch, lse, head, -100, needs, given)
        arguments = (hidden, targets, upstream[0], cu_seqlens, head, -100, needs, given)
        loss, other, _, *rest = row_chunks.weighted_log_likelihood(kernels, *arguments)
        for found in (sequence, token, lse, *gradients, loss, other, *rest):
            assert bool(found.isfinite().all() if given == 4 else found.isnan().all())


def test_no_gradient_where_nothing_comes_from_above(block):
    """Upstream 0 is a row of zeros even where the row is NaN; the logits are left alone where no gradient is wanted."""
    case = Guarded(3, 40, 64, torch.nan)
    case.logits[1] = torch.nan
    case.targets[2] = 99
    case.upstream[1:] = 0
    gradient = case.run(triton_ops.softmax_gradient, torch.bfloat16)
    assert not gradient[1:].any()
    assert gradient[0].any()
    forward, before = Guarded(3, 40, 64, torch.nan), Guarded(3, 40, 64, torch.nan).logits
    forward.run(triton_ops.softmax_gradient, torch.bfloat16, gradient=False)
    assert torch.equal(forward.logits, before)
    assert torch.equal(forward.token[0], case.token[0])


def test_probability_near_1_is_not_a_difference():
    """1 - p = 1e-12 comes out as that: fp32 has no number between 1 - 6e-8 and 1."""
    case = Guarded(1, 40, 64, torch.nan)
    case.bias.zero_()
    case.logits.fill_(0.0)
    case.targets[0] = 3
    case.logits[0, 3] = math.log(39) + 12 * math.log(10)
    case.upstream.fill_(1.0)
    gradient = case.run(triton_ops.softmax_gradient, torch.float32)
    assert gradient[0, 3].item() == pytest.approx(1e-12, rel=1e-5, abs=0)
    assert gradient[0, 4].item() == pytest.approx(-1e-12 / 39, rel=1e-5, abs=0)


def test_sums_of_sequences_stay_inside():
    """Offsets on a GPU are not checked before: those that lead outside end at the tokens."""
    token, targets = torch.tensor([-1.0, -2.0, 0.0, -4.0]), torch.tensor([5, 6, -100, 7])
    sums, lengths = triton_ops.sequence_sums(token, targets, torch.tensor([0, 1, 1, 4]), -100)
    assert sums.tolist() == [-1, 0, -6]
    assert lengths.tolist() == [1, 0, 2]
    sums, lengths = triton_ops.sequence_sums(token, targets, torch.tensor([-(2**40), 2, 2**40, 3]), -100)
    assert sums.tolist() == [-3, -4, 0]
    assert lengths.tolist() == [2, 1, 0]
    sums, _ = triton_ops.sequence_sums(torch.full((4096,), -2.03), torch.zeros(4096).long(), torch.tensor([0, 4096]), 1)
    assert sums.item() == pytest.approx(-2.03 * 4096, rel=1e-7)


# ---- the barrier


@triton.jit
def derivative_kernel(z_ptr, mu_ptr, s_ptr, out_ptr, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    mask = lanes < count
    z = tl.load(z_ptr + lanes, mask=mask, other=-1.0)
    tl.store(out_ptr + lanes, barrier_multiplier(z, tl.load(mu_ptr), tl.load(s_ptr)), mask=mask)


@pytest.mark.parametrize("mu", [1.0, 0.3, 1e-3, 1e-6])
def test_derivative_of_the_barrier_is_the_reference(mu):
    mu = torch.tensor(mu, dtype=torch.float64)
    s = mu * mu
    z = torch.cat(
        [torch.linspace(-3, 3, 201, dtype=torch.float64), torch.stack([-s, -s * 1.0000001, -s * 0.9999999, s])]
    )
    out = torch.empty_like(z)
    derivative_kernel[(1,)](z, mu, s, out, len(z), BLOCK=tl.constexpr(256))
    assert torch.equal(out, reference.barrier_multiplier(z, mu, s))


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow) for s in range(20, 60))])
def test_barrier_weights_has_the_bits_of_the_reference(seed, monkeypatch):
    """With a square root that is correctly rounded on both sides; torch's is not always."""
    monkeypatch.setattr(torch, "sqrt", lambda x: torch.from_numpy(numpy.sqrt(x.numpy())))
    rewards, norm, sums, *rest = random_problem(seed)
    state = fresh_state(rewards, rest[-2])
    for _ in range(3):
        expected = reference.barrier_weights(rewards, norm, sums, state, *rest)
        actual = triton_ops.barrier_weights(rewards, norm, sums, state, *rest)
        for field, a, e in zip(reference.BarrierWeights._fields, actual, expected, strict=True):
            assert a.shape == e.shape, field
            assert a.dtype == e.dtype, field
            assert torch.equal(bits(a), bits(e)), field
        state, rewards = expected[-1], rewards.flip(0) * 1.1


@pytest.mark.parametrize("index", [-1, 1, 2**40])
def test_reward_that_does_not_exist_is_not_an_access(index):
    rewards, mu = torch.ones(3, 1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    bounds = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    arguments = (rewards, torch.ones(3).double(), None, torch.zeros(1, 5).double(), torch.tensor([index]), bounds)
    seq_weight, multiplier, _, violation, *_ = triton_ops.barrier_weights(*arguments, mu, mu * mu, 0.1, True)
    assert violation.isnan().all()
    assert multiplier.tolist() == [0.0]
    assert seq_weight.tolist() == [0.0] * 3
