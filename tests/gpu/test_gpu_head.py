"""Every backend that is there against the float64 oracle on the device, and what is promised of a GPU alone."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from head_on_gpu import DEVICE, HEAD_BACKENDS, MISSING, Batch, backends, both, on_device, random_case, run
from head_oracle import assert_close_to_oracle

from l3m_kernels import barrier_weights, check_targets, log_likelihood, reference, set_workspace
from l3m_kernels.barrier import Bounds, initial_state

FUSED = [name for name in HEAD_BACKENDS if name != "reference"]
fused = pytest.mark.parametrize("backend", FUSED or [MISSING])


@both
@backends
@pytest.mark.parametrize("seed", [*range(100), *(pytest.param(s, marks=pytest.mark.slow) for s in range(1000, 2500))])
def test_oracle(seed, backend, weighted):
    case = random_case(seed, backend)
    inputs = case.build()
    set_workspace(case.workspace, low_memory=seed % 3 == 0)
    found = run(case, on_device(case, inputs), weighted, backend)
    assert_close_to_oracle(case, inputs, found, weighted, backend)


@both
@fused
@pytest.mark.parametrize("vocabulary", [1, 2, 1023, 32001, 128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabularies_of_models(dtype, vocabulary, backend, weighted):
    """Against the reference on the same device, which the random cases compare with float64."""
    batch = Batch(96, 64, vocabulary, dtype, masked=0.3)
    found, wanted = batch.gradients(weighted, backend), batch.gradients(weighted, "reference")
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for mine, right in zip(found, wanted, strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(mine, right, rtol=0, atol=max(tolerance * scale, 1e-6))


@both
@fused
def test_across_the_int32_boundary(backend, weighted):
    """One chunk of more than 2^31 logits: the last rows are as right as if they were alone."""
    rows, vocabulary, last = 16_896, 128_256, 64
    assert rows * vocabulary > 2**31
    needed = 4 * rows * vocabulary + (4 << 30)
    torch.cuda.empty_cache()  # what earlier tests left in it is free
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free device memory")
    set_workspace(needed)
    batch = Batch(rows, 16, vocabulary, torch.bfloat16)
    _, d_hidden, _ = batch.gradients(weighted, backend)
    token = log_likelihood(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, backend=backend).token
    torch.cuda.empty_cache()
    hidden = batch.hidden[-last:].detach().double().requires_grad_()
    wanted = reference.eager_log_likelihood(hidden, batch.weight.detach().double(), batch.targets[-last:])
    torch.testing.assert_close(token[-last:].double(), wanted, rtol=0, atol=1e-3)
    (right,) = torch.autograd.grad(-batch.seq_weight[-1] * wanted.sum(), hidden)
    torch.testing.assert_close(d_hidden[-last:].double(), right, rtol=0, atol=2e-2 * float(right.abs().max()))
    del batch, d_hidden, token
    torch.cuda.empty_cache()


@both
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again(dtype, backend, weighted):
    batch = Batch(300, 64, 5000, dtype, masked=0.4)
    first = batch.gradients(weighted, backend)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(batch.gradients(weighted, backend), first, strict=True))


@both
@backends
def test_second_backward(backend, weighted):
    batch = Batch(300, 64, 5000, torch.bfloat16)
    loss = batch.loss(weighted, backend)
    first = torch.autograd.grad(loss, (batch.hidden, batch.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (batch.hidden, batch.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def capture(
    batch: Batch, weighted: bool, backend: str, scored: int | None = None
) -> tuple[torch.cuda.CUDAGraph, tuple]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            batch.gradients(weighted, backend, scored)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = batch.gradients(weighted, backend, scored)
    return graph, outputs


@both
@fused
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_cuda_graph(masked, backend, weighted):
    """A replay on new inputs gives eager's bits; with unscored rows, which are computed then and not dropped, its values."""
    batch, other = (Batch(512, 64, 5000, torch.bfloat16, masked, seed) for seed in (0, 1))
    graph, outputs = capture(batch, weighted, backend)
    with torch.no_grad():
        batch.hidden.copy_(other.hidden)
        batch.targets.copy_(other.targets)
    graph.replay()
    found = [tensor.clone() for tensor in outputs]
    for mine, right in zip(found, batch.gradients(weighted, backend), strict=True):
        if masked:
            torch.testing.assert_close(mine, right, rtol=0, atol=2e-2 * float(right.abs().max()))
        else:
            assert torch.equal(mine, right)


@both
@fused
def test_cuda_graph_with_a_count(backend, weighted):
    """Unscored rows are dropped in the graph too, so its bits are eager's; inputs with another count are told, not answered."""
    batch, other = (Batch(512, 64, 5000, torch.bfloat16, seed=seed) for seed in (0, 1))
    for one in (batch, other):
        one.targets[::3] = -100
    scored = batch.scored()
    graph, outputs = capture(batch, weighted, backend, scored)
    with torch.no_grad():
        batch.hidden.copy_(other.hidden)
        batch.targets.copy_(other.targets)
    graph.replay()
    found = [tensor.clone() for tensor in outputs]
    for mine, right in zip(found, batch.gradients(weighted, backend, scored), strict=True):
        assert torch.equal(mine, right)
    check_targets()
    batch.targets[1] = -100
    graph.replay()
    assert all(bool(tensor.isnan().all()) for tensor in outputs)
    with pytest.raises(ValueError, match="scored"):
        check_targets()


@both
@fused
def test_autocast(backend, weighted):
    """fp32 parameters under autocast: as bf16 ones, and gradients reach the fp32 parameters."""
    batch = Batch(300, 64, 5000, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = batch.loss(weighted, backend)
    gradients = torch.autograd.grad(loss, (batch.hidden, batch.weight))
    low = Batch(300, 64, 5000, torch.float32)
    low.hidden, low.weight = (t.detach().bfloat16().requires_grad_() for t in (batch.hidden, batch.weight))
    wanted = low.gradients(weighted, backend)
    assert loss.dtype == torch.float32
    for mine, right in zip((loss.detach(), *gradients), wanted, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, right.float())


@both
@fused
def test_grad_scaler(backend, weighted):
    """A loss scale that is no fp16 number: the step is that of the unscaled loss, where fp16 can hold the gradients."""
    results, mean = [], 4096  # of a loss whose gradients are up to 8
    for scale in (1.0, 2.0**16):
        batch = Batch(300, 64, 5000, torch.float16)
        weight = torch.nn.Parameter(batch.weight.detach().float())
        scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        optimizer = torch.optim.SGD([weight], lr=1e-3 * mean)
        batch.weight = weight.half()
        scaler.scale(batch.loss(weighted, backend) / mean).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(weight.detach().half(), batch.weight), "the step was skipped"
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@both
@fused
@pytest.mark.filterwarnings("ignore")  # torch's compiler uses what torch has deprecated
@pytest.mark.parametrize("given", [False, True])
def test_compiled_fullgraph(given, backend, weighted):
    torch.compiler.reset()
    batch = Batch(300, 64, 5000, torch.bfloat16, masked=0.3)
    scored = batch.scored() if given else None

    def step(hidden, weight):
        batch.hidden, batch.weight = hidden * 1.0, weight
        return batch.loss(weighted, backend, scored)

    leaves = (batch.hidden, batch.weight)
    loss = torch.compile(step, fullgraph=True)(*leaves)
    found = (loss, *torch.autograd.grad(loss, leaves))
    loss = step(*leaves)
    for mine, right in zip(found, (loss, *torch.autograd.grad(loss, leaves)), strict=True):
        assert torch.equal(mine, right)


def waits(function) -> int:
    """How often the host waited for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(item.message) for item in caught)


@fused
def test_without_a_count_the_host_waits_once_for_it_and_for_nothing_else(backend):
    batch = Batch(300, 64, 5000, torch.bfloat16, masked=0.3)
    batch.gradients(True, backend)
    assert waits(lambda: batch.loss(True, backend)) <= 1
    loss = batch.loss(True, backend)
    assert waits(lambda: torch.autograd.grad(loss, (batch.hidden, batch.weight))) == 0
    assert waits(lambda: batch.gradients(False, backend)) <= 2  # forward and backward have different rows


@contextmanager
def no_wait():
    """An operation that makes the host wait for the device raises inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["packed", "offsets on the host", "padded"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_with_a_count_the_host_never_waits(low_memory, layout, dtype, backend, weighted):
    """Forward and backward; all rows have a gradient here, so what was counted has the same rows and the same bits."""
    set_workspace(1 << 20, low_memory=low_memory)
    batch = Batch(300, 64, 5000, dtype, masked=0.3)
    if layout == "offsets on the host":
        batch.cu_seqlens = torch.arange(0, 301, 75)
    if layout == "padded":
        batch.cu_seqlens, batch.targets = None, batch.targets.view(4, -1)
        batch.hidden = batch.hidden.detach().view(4, -1, 64).requires_grad_()
    counted, scored = batch.gradients(weighted, backend), batch.scored()
    batch.gradients(weighted, backend, scored)
    with no_wait():
        given = batch.gradients(weighted, backend, scored)
    assert all(torch.equal(a, b) for a, b in zip(given, counted, strict=True))


@both
@fused
@pytest.mark.parametrize("wrong", [-210, -1, 1, 90])
def test_a_wrong_count(wrong, backend, weighted):
    """Nothing waits to see; all results are NaN, and the next look at the flags raises."""
    batch = Batch(300, 64, 5000, torch.bfloat16)
    batch.targets[:90] = -100
    check_targets()
    with no_wait():
        found = batch.gradients(weighted, backend, 210 + wrong)
    assert all(bool(tensor.isnan().all()) for tensor in found)
    with pytest.raises(ValueError, match="`scored` that is not the number"):
        check_targets()
    check_targets()  # said once
    with pytest.raises(ValueError, match=r"scored must be in \[0, T = 300\]"):
        batch.loss(weighted, backend, 301)


@fused
def test_barrier_weights_never_makes_the_host_wait(backend):
    rewards = torch.randn(64, 4, dtype=torch.float64, device=DEVICE)
    bounds = Bounds.of([(k, 1.0 - 2 * (k % 2), 0.1 * k, 1.0, 0.0, 2.0, float("inf")) for k in range(4)], device=DEVICE)
    state, mu = initial_state(4, device=DEVICE), torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    barrier_weights(rewards, state, bounds, mu, backend=backend)
    with no_wait():
        barrier_weights(rewards, state, bounds, mu, backend=backend)


@both
@fused
def test_a_target_outside_the_vocabulary(backend, weighted):
    """Its row is NaN, the others are as they were, and the next look at the flag raises."""
    batch = Batch(64, 16, 1000, torch.bfloat16)
    clean = log_likelihood(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, backend=backend).token
    check_targets()
    for row, wrong in ((3, 1000), (20, -1), (50, 2**60)):
        batch.targets[row] = wrong
    loss, d_hidden, _ = batch.gradients(weighted, backend)
    with pytest.raises(IndexError, match="outside the vocabulary"):
        check_targets()  # or the next call may
    token = log_likelihood(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, backend=backend).token
    torch.cuda.synchronize()
    broken = torch.tensor([row in (3, 20, 50) for row in range(64)], device=DEVICE)
    assert torch.equal(token.isnan(), broken)
    assert torch.equal(token[~broken], clean[~broken])
    assert torch.equal(d_hidden.isnan().any(1), broken)
    assert loss.isnan()
    with pytest.raises(IndexError, match="outside the vocabulary"):
        check_targets()
    check_targets()  # said once


@both
@fused
def test_on_another_stream(backend, weighted):
    batch = Batch(300, 64, 5000, torch.bfloat16, masked=0.3)
    wanted = batch.gradients(weighted, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = batch.gradients(weighted, backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@fused
def test_on_a_device_that_is_not_the_current_one(backend):
    batch = Batch(300, 64, 5000, torch.bfloat16)
    wanted = batch.gradients(True, backend)
    for name, value in vars(batch).items():
        setattr(batch, name, value.detach().to("cuda:1").requires_grad_(value.requires_grad))
    found = batch.gradients(True, backend)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, wanted, strict=True))
