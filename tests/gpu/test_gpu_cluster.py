"""The kernel that holds a row in a cluster's registers, on the device: against float64, its bits, and where it cannot run."""

import pytest
import torch
from head_on_gpu import DEVICE, HEAD_BACKENDS
from torch import Tensor

VOCABULARIES = (1, 1000, 16385, 32000, 50257, 128256, 151936, 163841, 262144)


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch):
    if "cuda" not in HEAD_BACKENDS:
        pytest.skip("backend cuda cannot be used here")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no thread block clusters")
    monkeypatch.setenv("L3M_ROW_KERNEL", "cluster")


def rows_of(logits: Tensor, targets: Tensor, upstream: Tensor | None, softcap: float, dtype: torch.dtype):
    """-> token (n,), lse (n,), gradient (n, V) of rows 32 columns apart from their neighbours; the logits are copied."""
    n, vocabulary = logits.shape
    stride = -(-vocabulary // 32) * 32 + 32
    buffer = torch.full((n, stride), torch.nan, device=DEVICE)
    buffer[:, :vocabulary] = logits
    token, lse = (torch.full((n,), torch.nan, device=DEVICE) for _ in range(2))
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    torch.ops.l3m_kernels.cuda_softmax_gradient(
        buffer[:, :vocabulary], targets, upstream, None, softcap, 0.8, dtype, token, lse, flag, False
    )
    assert not flag.any()
    assert buffer[:, vocabulary:].isnan().all()
    return token, lse, buffer.view(dtype)[:, :vocabulary]


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_rows_against_float64(vocabulary, dtype, softcap):
    generator = torch.Generator(DEVICE).manual_seed(vocabulary)
    logits = 3 * torch.randn(300, vocabulary, device=DEVICE, generator=generator)
    targets = torch.randint(vocabulary, (300,), device=DEVICE, generator=generator)
    upstream = torch.randn(300, device=DEVICE, generator=generator)
    x = logits.double().requires_grad_()
    z = (softcap * torch.tanh(x / softcap) if softcap else x) * 0.8
    wanted = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    (d_wanted,) = torch.autograd.grad(wanted, x, upstream.double())
    token, lse, gradient = rows_of(logits, targets, upstream, softcap, dtype)
    torch.testing.assert_close(token.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), z.detach().logsumexp(1), rtol=1e-6, atol=1e-6)
    relative = {torch.float32: 3e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(gradient.double(), d_wanted, rtol=relative, atol=1e-7)
    for _ in range(5):  # in place, by blocks that run at once: a race would show in some run
        again = rows_of(logits, targets, upstream, softcap, dtype)
        for one, other in zip(again, (token, lse, gradient), strict=True):
            assert torch.equal(one, other)
    alone = rows_of(logits, targets, None, softcap, dtype)
    assert torch.equal(alone[0], token)


def test_where_it_cannot_run_it_says_why():
    logits, rows = torch.zeros(2, 262145, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="L3M_ROW_KERNEL=cluster: a row has more columns than the 262144"):
        rows_of(logits, rows, None, 0.0, torch.float32)


def test_a_kernel_that_there_is_not(monkeypatch):
    monkeypatch.setenv("L3M_ROW_KERNEL", "clusters")
    logits, rows = torch.zeros(2, 8, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="L3M_ROW_KERNEL must be auto, two_pass or cluster, got 'clusters'"):
        rows_of(logits, rows, None, 0.0, torch.float32)
