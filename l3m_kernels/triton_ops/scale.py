"""A gradient times a number on the device, in place: all programs leave at once where the number is 1, as it is for a loss itself."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3m_kernels.triton_ops.configs import ELEMENTS

PROGRAMS = 8  # of a multiprocessor


@triton.jit
def scale_kernel(
    values_ptr,  # (count,) fp32, bf16 or fp16
    factor_ptr,  # () fp32
    count,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, count, step):
            here = start + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + here, mask=here < count, other=0.0).to(tl.float32)
            tl.store(values_ptr + here, (values * factor).to(values_ptr.dtype.element_ty), mask=here < count)


def scale(values: Tensor, factor: Tensor) -> None:
    """values *= factor () fp32, rounded once; `values` contiguous."""
    count, device = values.numel(), values.device
    if not count:
        return
    processors = torch.cuda.get_device_properties(device).multi_processor_count if values.is_cuda else 1
    programs = min(triton.cdiv(count, ELEMENTS.block), PROGRAMS * processors)
    options: dict[str, Any] = {"BLOCK": ELEMENTS.block, "num_warps": ELEMENTS.warps}
    with torch.cuda.device_of(values):
        scale_kernel[(programs,)](values, factor, count, **options)
