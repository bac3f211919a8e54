"""The two small Triton kernels in the interpreter: the product that is exact where the program allows TF32, and the scale on the device.

Runs where TRITON_INTERPRET=1; `test_triton.py` starts such a process.
"""

import pytest
import torch
from head_cases import HEAD_BACKENDS
from test_products import settings
from torch import Tensor

from l3m_kernels import weighted_log_likelihood

if "triton" not in HEAD_BACKENDS:
    pytest.skip("the kernels run in the interpreter only where TRITON_INTERPRET=1", allow_module_level=True)

from l3m_kernels import triton_ops

GUARD = 12345.0


def strided(rows: int, columns: int, transposed: bool, generator: torch.Generator) -> Tensor:
    """Inside of a larger buffer, rows or columns next to each other."""
    whole = torch.full((rows + 2, columns + 3) if not transposed else (columns + 2, rows + 3), GUARD)
    inside = whole[1:-1, 1:-2]
    inside.copy_(torch.randn(inside.shape, generator=generator))
    return inside.t() if transposed else inside


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [(False, True), (False, False), (True, False)], ids=["NT", "NN", "TN"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 70, 3), (130, 33, 65), (64, 64, 64), (3, 0, 4), (0, 4, 3)])
def test_product(shape, transposed, accumulate):
    """Of every form that the head has, against float64, and nothing around it is written."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)
    a, b = strided(rows, depth, transposed[0], generator), strided(depth, columns, transposed[1], generator)
    whole = torch.full((rows + 2, columns + 3), GUARD)
    out = whole[1:-1, 1:-2]
    before = torch.randn(out.shape, generator=generator) if accumulate else torch.full(out.shape, torch.nan)
    out.copy_(before)
    triton_ops.product(a, b, out, accumulate)
    wanted = a.double() @ b.double() + (before.double() if accumulate else 0)
    size = a.double().abs() @ b.double().abs() + 1
    assert bool(((out.double() - wanted).abs() <= 1e-6 * size).all())
    whole[1:-1, 1:-2] = GUARD
    assert bool((whole == GUARD).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 4095, 4097])
@pytest.mark.parametrize("factor", [1.0, 0.0, -3.7, 65536.0, float("nan")])
def test_scale(factor, count, dtype):
    """The bits of torch's product with the number; where that is 1 nothing is read or written."""
    buffer = torch.randn(count + 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = buffer.clone()
    triton_ops.scale(buffer[4 : 4 + count], torch.tensor(factor))
    assert torch.equal(buffer[:4], before[:4])
    assert torch.equal(buffer[4 + count :], before[4 + count :])
    wanted = before[4 : 4 + count] * torch.tensor(factor)
    torch.testing.assert_close(buffer[4 : 4 + count], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("allowed", [False, True])
def test_the_head_where_tf32_is_allowed_runs_the_product_of_its_own(allowed, monkeypatch):
    ran = []
    original = triton_ops.product.__globals__["product_kernel"]

    class Counted:
        def __getitem__(self, grid):
            ran.append(grid)
            return original[grid]

    monkeypatch.setitem(triton_ops.product.__globals__, "product_kernel", Counted())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=generator).requires_grad_()
    weight = torch.randn(9, 5, generator=generator).requires_grad_()
    arguments = (hidden, weight, torch.arange(6), torch.ones(1), torch.tensor([0, 6]))
    with settings(allow_tf32=allowed):
        found = torch.autograd.grad(weighted_log_likelihood(*arguments, backend="triton")[0], (hidden, weight))
    assert len(ran) == (3 if allowed else 0)
    wanted = torch.autograd.grad(weighted_log_likelihood(*arguments, backend="reference")[0], (hidden, weight))
    torch.testing.assert_close(found, wanted)
