"""The CUDA kernels' own source, compiled by the host's compiler and run with random thread orders: what no GPU is needed for."""

import ctypes
import itertools

import pytest
import torch
from barrier_problems import bits, fresh_state, random_problem
from row_cases import exact
from rows_on_host import COMPILER, DTYPES, GUARD, Tolerance, pointer, problem, row_kernels, softmax_gradient

from l3m_kernels import chunk_sizes, chunked, reference, row_chunks

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")

VOCABULARIES = (1, 2, 3, 5, 31, 64, 127, 1000, 1024, 1025, 2047, 4096, 4097, 9001, 12290)
kernel = pytest.mark.parametrize("cluster", [False, True], ids=["two_pass", "cluster"])


@kernel
@pytest.mark.parametrize("seed", [*range(40), *(pytest.param(s, marks=pytest.mark.slow) for s in range(1000, 2000))])
def test_rows_against_float64(kernels, seed, cluster):
    vocabulary = VOCABULARIES[seed % len(VOCABULARIES)]
    arguments, draw = problem(seed, vocabulary)
    right = Tolerance(*arguments)
    gradient = draw.choice((None, torch.float32, torch.bfloat16, torch.float16))
    steps, shifts = ((0, -vocabulary % 4, -vocabulary % 8, 1, 5), (0, 0, 1, 2)) if not cluster else ((0, 4, 8), (0, 4))
    stride = -(-vocabulary // 4) * 4 if cluster else vocabulary
    layout = {"stride": stride + draw.choice(steps), "shift": draw.choice(shifts), "cluster": cluster}
    found = softmax_gradient(kernels, *arguments, gradient, order=seed, **layout)
    assert found[2] == 0
    right.statistics(*found[:2])
    if gradient is None:
        return
    for known in (None, found[1]):
        again = softmax_gradient(kernels, *arguments, gradient, lse=known, order=seed + 1, **layout)
        right.gradient(again[3], known is not None)
        if known is None:
            assert torch.equal(again[3], found[3]), "another order of the threads, other bits"
        apart = layout["stride"] + draw.choice((0, -layout["stride"] % 4, 3) if not cluster else (0, 4))
        elsewhere = softmax_gradient(kernels, *arguments, gradient, lse=known, order=seed + 2, apart=apart, **layout)
        right.gradient(elsewhere[3], known is not None)
        if layout["shift"] == 0 and layout["stride"] % 4 == apart % 4 == 0:  # or the order of the sum is another
            assert torch.equal(elsewhere[3], again[3]), "where it is written decides what is"


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("vocabulary", "cluster"), [(7, False), (4100, False), (7, True), (20004, True)])
def test_hazards(kernels, vocabulary, cluster, known, gradient):
    """-inf, NaN, all -inf, targets that do not exist: as the float64 rows of torch, a NaN in its own row only."""
    nan, inf = float("nan"), float("inf")
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(1))
    targets = torch.full((9,), 3)
    logits[1, 5] = -inf  # another than the target
    logits[2, 3] = -inf  # the target
    logits[3] = -inf
    logits[4, 6] = nan
    logits[5, 3] = nan
    targets[6], targets[7] = vocabulary, -1
    targets[8] = torch.iinfo(torch.int64).min
    upstream = torch.ones(9)
    arguments = (logits, targets.clamp(0, vocabulary - 1), upstream, None, None, 1.0)
    token, lse, gradients = exact(*arguments)
    token[6:], lse[6:], gradients[6:] = nan, nan, nan
    arguments = (logits, targets, *arguments[2:])
    options = {"cluster": cluster, "stride": -(-vocabulary // 4) * 4}
    found = softmax_gradient(kernels, *arguments, gradient, lse=lse.float() if known else None, **options)
    assert found[2] == (not known)
    tolerance = 1e-5 if gradient == torch.float32 else 1e-2
    torch.testing.assert_close(found[3].double(), gradients, rtol=tolerance, atol=1e-6, equal_nan=True)
    if not known:
        torch.testing.assert_close(found[0].double(), token, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert not found[1][:3].isnan().any()
        assert found[1][3:].isnan().all()
    upstream.zero_()
    zero = softmax_gradient(kernels, *arguments, gradient, lse=found[1] if known else None, **options)
    assert not zero[3].any(), "no upstream gradient, no gradient, NaN or not"
    fine = softmax_gradient(kernels, logits[:3], targets[:3], upstream[:3], None, None, 1.0, gradient, **options)
    assert fine[2] == 0


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0, 64, 100), (0, 33, 70, 100)])
def test_parts_of_the_vocabulary_are_the_whole(kernels, bounds, gradient):
    """With lse known the columns may be some: a target among others is no target, and no error."""
    (logits, targets, upstream, *_), _ = problem(5, 100, rows=6)
    token, lse, _, whole = softmax_gradient(kernels, logits, targets, upstream, None, None, 0.7, gradient)
    for first, last in itertools.pairwise(bounds):
        part = logits[:, first:last].contiguous()
        *_, flag, found = softmax_gradient(
            kernels, part, targets - first, upstream, None, None, 0.7, gradient, lse=lse, stride=last - first
        )
        assert flag == 0
        wanted = whole[:, first:last]
        torch.testing.assert_close(found, wanted, rtol=1e-2 if gradient == torch.bfloat16 else 1e-4, atol=2e-6)
    assert bool((token < 0).all())


def test_what_cannot_be_launched_is_refused(kernels):
    null, zero = pointer(None), ctypes.c_int64(0)
    options = (null, null, null, 0, 0, ctypes.c_float(0), ctypes.c_float(1), 0, null, null, null, 0, null, zero)
    one, large = ctypes.c_int64(1), ctypes.c_int64(1 << 31)
    assert kernels.softmax_gradient(null, zero, zero, one, *options) == 0  # no rows
    assert kernels.softmax_gradient(null, zero, one, zero, *options) != 0
    assert kernels.softmax_gradient(null, zero, one, large, *options) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("factor", [1.0, 0.0, -3.7, 65536.0, float("nan")])
def test_scale_has_the_bits_of_torch(kernels, factor, shift, dtype):
    """Where the number is 1 nothing is written; memory that is not aligned, and what is left of it by 16 bytes at a time."""
    for count in (0, 1, 7, 1000, 8197):
        buffer = torch.randn(count + GUARD + shift, generator=torch.Generator().manual_seed(count)).to(dtype)
        before, number = buffer.clone(), torch.tensor(factor)
        inside = slice(shift, shift + count)
        kernels.set_order(count)
        assert kernels.scale(pointer(buffer[inside]), DTYPES[dtype], ctypes.c_int64(count), pointer(number), 3) == 0
        before[inside] *= number
        torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


@kernel
@pytest.mark.parametrize("way", ["chunks", "low_memory", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_the_head_with_this_kernel(kernels, seed, dtype, way, cluster, monkeypatch):
    """row_chunks on a CPU with the CUDA kernel, against the reference in float64: strides, parts and dtypes fit each other."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width, vocabulary = 23, 8, (40, 77, 1030)[seed % 3]
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if seed % 2 else None
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::5] = -100
    cu_seqlens, seq_weight = torch.tensor([0, 4, 4, 15, 23]), torch.tensor([1.0, 2.0, 0.0, -0.5])
    grad_sequence, grad_token = torch.randn(4, generator=generator), torch.randn(tokens, generator=generator)
    options = ((None, 5.0)[seed // 3], 0.7)
    workspace = 5000 if seed % 2 else 1 << 20
    if way == "gathered":
        if dtype == torch.float32:
            pytest.skip("gradients of fp32 are as large as the logits")
        monkeypatch.setattr(chunk_sizes, "LEAST_GATHERED", 1)
        stride = chunk_sizes.row_stride(vocabulary)
        workspace = (
            18 * 2 * stride
            + 5 * (4 * stride + 6 * width)
            - (4 * vocabulary * width) * (dtype == torch.bfloat16 and seed % 3 == 2)
        )
        monkeypatch.setattr(row_chunks._Batch, "gradient_of", None)  # of logits in place
    head = chunked.Head(weight, bias, *options, workspace, way == "low_memory")
    exact_head = chunked.Head(weight.double(), None if bias is None else bias.double(), *options, 1 << 20)
    needs, rows = (True, True, bias is not None), row_kernels(kernels, cluster)
    count = int((targets != -100).sum()) if seed % 2 or way == "gathered" else None

    found = row_chunks.weighted_log_likelihood(rows, hidden, targets, seq_weight, cu_seqlens, head, -100, needs, count)
    batch = (hidden.double(), targets)
    wanted = chunked.weighted_log_likelihood(*batch, seq_weight.double(), cu_seqlens, exact_head, -100, needs)
    sequence, length, token, lse = row_chunks.log_likelihood(rows, hidden, targets, cu_seqlens, head, -100, count)
    upstream = (grad_sequence, grad_token, hidden, targets, cu_seqlens, lse, head, -100, needs)
    found = (*found, sequence, length, token, lse, *row_chunks.log_likelihood_backward(rows, *upstream, count))
    statistics = chunked.log_likelihood(*batch, cu_seqlens, exact_head, -100)
    upstream = (grad_sequence.double(), grad_token.double(), *batch, cu_seqlens, statistics[3], exact_head, -100, needs)
    wanted = (*wanted, *statistics, *chunked.log_likelihood_backward(*upstream))
    for index, (mine, right) in enumerate(zip(found, wanted, strict=True)):
        gradient = index in (4, 5, 6, 11, 12, 13)
        scale = right.abs().max() if right.numel() else 1.0
        tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype] if gradient else 1e-5
        torch.testing.assert_close(mine.double(), right.double(), rtol=0, atol=float(tolerance * scale))


def barrier_weights(kernels, rewards, norm, sums, state, index, bounds, mu, s, smoothing, leave_one_out):
    sequences, count, constraints = *rewards.shape, len(index)
    double = torch.float64
    outputs = [torch.full((sequences,), torch.nan), *(torch.full((size,), 9.0, dtype=double) for size in (
        constraints, 1, constraints, count, count))]  # fmt: skip
    new_state = torch.full(state.shape, 9.0, dtype=double)
    scratch = torch.full((count, 4), torch.nan, dtype=double), torch.full((constraints,), torch.nan, dtype=double)
    sizes = map(ctypes.c_int64, (sequences, count, constraints))
    inputs = (rewards, norm, sums, state, index, bounds, mu, s)
    status = kernels.barrier_weights(
        *sizes, *map(pointer, inputs), ctypes.c_int64(state.shape[1]), ctypes.c_double(smoothing or 0.0), int(leave_one_out),
        *map(pointer, (*scratch, *outputs, new_state)),
    )  # fmt: skip
    assert status == 0
    outputs[2] = outputs[2].reshape(())
    return (*outputs, new_state)


@pytest.mark.parametrize("seed", range(100))
def test_barrier_weights_has_the_bits_of_the_reference(kernels, seed):
    rewards, norm, sums, *rest = random_problem(seed)
    rest[1] = rest[1].contiguous()
    state = fresh_state(rewards, rest[-2])
    for step in range(3):
        kernels.set_order(seed + step)
        expected = reference.barrier_weights(rewards, norm, sums, state, *rest)
        actual = barrier_weights(kernels, rewards.contiguous(), norm, sums, state, *rest)
        for field, a, e in zip(reference.BarrierWeights._fields, actual, expected, strict=True):
            assert a.shape == e.shape, field
            if not torch.equal(
                bits(a), bits(e)
            ):  # torch's square root is an ulp off now and then; what follows from it, a few
                torch.testing.assert_close(a, e, rtol=1e-6 if field == "seq_weight" else 1e-13, atol=0, equal_nan=True)
        state, rewards = expected[-1].contiguous(), rewards.flip(0) * 1.1


@pytest.mark.parametrize(("sequences", "rewards"), [(5000, 3), (70, 300), (0, 2)])
def test_barrier_weights_of_many(kernels, sequences, rewards):
    """More rewards than threads, more responses than are staged at a time."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sequences, rewards, dtype=torch.float64, generator=generator)
    index = torch.arange(rewards).repeat(2)
    bounds = torch.rand(2 * rewards, 6, dtype=torch.float64, generator=generator) + 0.1
    mu = torch.tensor(0.1, dtype=torch.float64)
    state = torch.zeros(rewards, 5, dtype=torch.float64)
    arguments = (values, torch.ones(sequences).double(), None, state, index, bounds, mu, mu * mu, 0.1, True)
    for a, e in zip(barrier_weights(kernels, *arguments), reference.barrier_weights(*arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6 if a.dtype == torch.float32 else 1e-13, atol=0, equal_nan=True)


def test_a_reward_that_does_not_exist_is_never_an_index(kernels):
    mu = torch.tensor(0.1, dtype=torch.float64)
    index = torch.tensor([0, 1, -1, 1 << 60])
    arguments = (torch.ones(4, 1).double(), torch.ones(4).double(), None, torch.zeros(1, 5).double(), index)
    found = barrier_weights(kernels, *arguments, torch.ones(4, 6).double(), mu, mu * mu, 0.1, True)
    assert found[1].isnan().tolist() == [False, True, True, True]
    assert found[0].isnan().all()
