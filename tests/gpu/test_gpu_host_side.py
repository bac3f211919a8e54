"""The host side on a CUDA device: precision, offsets, captures, the rounding of a single chunk, a loss times a number."""

import gc
import subprocess
import sys
import threading

import pytest
import torch
from head_on_gpu import DEVICE, Batch, both
from test_gpu_head import fused

from l3m_kernels import check_targets, gradient_sums, log_likelihood, row_chunks, set_workspace
from l3m_kernels.chunk_sizes import gathered_rows, row_bytes, row_stride


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@both
@fused
def test_fp32_is_fp32_where_the_program_allows_tf32(backend, weighted, tf32):
    """Against float64: TF32 has errors of 1e-3, and torch's own product has them here."""
    batch = Batch(300, 512, 5000, torch.float32)
    exact = batch.hidden.detach().double() @ batch.weight.detach().double().t()
    torch_error = float((batch.hidden.detach() @ batch.weight.detach().t() - exact).abs().max())
    assert torch_error > 1e-4, "this device has no TF32 to keep out"
    found = batch.gradients(weighted, backend)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    wanted = batch.gradients(weighted, backend)
    batch.hidden, batch.weight = (leaf.detach().double().requires_grad_() for leaf in (batch.hidden, batch.weight))
    exact = batch.gradients(weighted, "reference")
    for mine, torchs, right in zip(found, wanted, exact, strict=True):
        if backend == "cuda":
            assert torch.equal(mine, torchs)
        error, usual = (float((each.double() - right).norm() / right.norm()) for each in (mine, torchs))
        assert error <= 4 * usual + 1e-7, "TF32 would be 1e-4"


@fused
def test_threads_that_compute_beside_a_call_keep_their_tf32(backend, tf32):
    batch = Batch(2000, 512, 20_000, torch.float32)
    a = torch.randn(512, 512, device=DEVICE)
    wanted = a @ a
    done, wrong = threading.Event(), []

    def other():
        while not done.is_set():
            if not torch.equal(a @ a, wanted):
                wrong.append(1)

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(5):
        batch.gradients(True, backend)
    done.set()
    thread.join()
    assert wrong == []


@both
@fused
@pytest.mark.parametrize(
    "given", [[0, 75, 150, 225, 290], [0, 75, 150, 225, 2**40], [-5, 75, 150, 225, 300], [0, 200, 9, 225, 300]]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_that_are_wrong(dtype, given, backend, weighted):
    """No assertion of the device, which would end the process: NaN, and the next look raises."""
    batch = Batch(300, 64, 5000, torch.bfloat16)
    if dtype == torch.int32 and max(given) > 2**31:
        given = [*given[:-1], 2**31 - 1]
    batch.cu_seqlens = torch.tensor(given, dtype=dtype, device=DEVICE)
    found = batch.gradients(weighted, backend)
    torch.cuda.synchronize()
    assert all(bool(tensor.isnan().all()) for tensor in found)
    with pytest.raises(ValueError, match="cu_seqlens that do not start at 0"):
        check_targets()


@fused
def test_a_first_call_inside_a_capture_is_refused_by_name(backend):
    program = f"""
import torch
from l3m_kernels import log_likelihood
hidden, weight = torch.zeros(4, 8, device="cuda"), torch.zeros(9, 8, device="cuda")
targets, offsets = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.tensor([0, 4], device="cuda")
hidden @ weight.t()
torch.cuda.synchronize()
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    log_likelihood(hidden, weight, targets, offsets, backend="{backend}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "cannot be captured into a CUDA graph" in done.stderr
    assert "call the op once before the capture" in done.stderr


@both
@fused
def test_a_single_chunk_rounds_as_several_products_would(backend, weighted, monkeypatch):
    """16 bits out of the product are its fp32 sums, rounded once: no part of a sum was rounded before."""
    set_workspace(8 << 30)
    batch = Batch(4096, 2048, 32_768, torch.bfloat16)
    direct = batch.gradients(weighted, backend)
    monkeypatch.setattr(gradient_sums, "WHOLE_WAVES", 1 << 30)
    rounded = batch.gradients(weighted, backend)
    for mine, right in zip(direct, rounded, strict=True):
        assert torch.equal(mine, right)


@both
@fused
def test_gathered_gradients_are_those_of_chunks(backend, weighted, monkeypatch):
    """All rows' in 16 bits, in the place of the weight's fp32 sum: the statistics have the same bits, the sums another order."""
    asked = []

    def gathered(*sizes, **options):
        asked.append(gathered_rows(*sizes, **options))
        return asked[-1]

    monkeypatch.setattr(row_chunks, "gathered_rows", gathered)
    rows, width, vocabulary = 2000, 1024, 20_001
    held = rows * 2 * row_stride(vocabulary) + 600 * row_bytes(vocabulary, width, 2)
    set_workspace(held - 4 * vocabulary * width)
    batch = Batch(rows, width, vocabulary, torch.bfloat16)
    found = batch.gradients(weighted, backend)
    assert asked
    assert 512 <= asked[0] <= 600
    monkeypatch.setattr(row_chunks, "gathered_rows", lambda *_, **__: 0)
    chunks = batch.gradients(weighted, backend)
    assert torch.equal(found[0], chunks[0])
    exact = [tensor.double() for tensor in batch.gradients(weighted, "reference")]
    for mine, others, right in zip(found[1:], chunks[1:], exact[1:], strict=True):
        error, before = ((tensor.double() - right).norm() / right.norm() for tensor in (mine, others))
        assert error <= 1.2 * before + 1e-4


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [False, True])
def test_a_loss_times_a_number(kept, dtype, backend):
    """The number is on the device, and the gradients are those of the loss times it, rounded once."""
    batch = Batch(300, 64, 5000, dtype)
    leaves = (batch.hidden, batch.weight)
    plain = torch.autograd.grad(batch.loss(True, backend), leaves)
    for factor in (1.0, 0.375, -3.0):
        loss = factor * batch.loss(True, backend)
        for mine, right in zip(torch.autograd.grad(loss, leaves, retain_graph=kept), plain, strict=True):
            if dtype != torch.float16 or factor == 1:  # its gradients are rounded after the number, not before
                assert torch.equal(mine, right * factor)
            torch.testing.assert_close(mine.float(), right.float() * factor, rtol=4e-3, atol=1e-6)


@fused
@pytest.mark.parametrize("rows", [3072, 7000], ids=["one", "gathered"])
def test_memory_of_a_single_chunk(backend, rows):
    """No fp32 sum of the weight's gradient: what is held beyond the gradients is within the workspace and that sum."""
    width, vocabulary = 4096, 65_536
    batch = Batch(rows, width, vocabulary, torch.bfloat16)
    batch.gradients(True, backend)
    gc.collect()  # what other tests have left would be freed in between
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = batch.gradients(True, backend)
    held = torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in gradients)
    least, accumulator = (4 if rows == 3072 else 2) * rows * vocabulary, 4 * width * vocabulary
    assert least <= held <= (512 << 20) + accumulator
    assert bool(log_likelihood(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens).token.isfinite().all())
