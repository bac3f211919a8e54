"""A row of logits to its log-likelihood and, in place or elsewhere, to the gradient of the logits: two passes, one program a row.

Letters: n rows, V vocabulary. With products x of hidden and weight, z = softcap(x + bias) / temperature and p = softmax(z), the row of
x becomes u (onehot - p) / temperature * softcap'(x + bias). The first pass keeps a maximum and a sum of exponentials of all but the
target for each lane, so 1 - p of the target is that sum over the whole one and not a difference of numbers near 1.

What is read and written goes to the end of the row in memory, `stride` elements, which is a multiple of 16 where V may not be: accesses
are then 16 bytes wide. Nothing that is computed from what lies there is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3m_kernels.triton_ops.configs import for_rows

LOWEST = tl.constexpr(-3.4e38)  # below any logit but -inf: a maximum of nothing, with which differences stay numbers

MOST_COLUMNS = 2**31 - 2**16  # a column is an int32, also one past the end of the last block


@triton.jit
def _tanh(x):
    """1.3 ulp. The polynomial was fitted to (tanh(x) / x - 1) / x^2 on [0, 0.625]; beyond, 1 - 2 / (exp(2x) + 1) loses nothing."""
    size = tl.abs(x)
    square = x * x
    series = -0.00570498741 * square + 0.0206390876
    series = series * square - 0.0537397152
    series = series * square + 0.133314422
    series = series * square - 0.333332819
    beyond = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * square * series, tl.where(x < 0.0, -beyond, beyond))


@triton.jit
def _logits(logits_ptr, bias_ptr, columns, readable, real, softcap, inverse_temperature, CAPPED: tl.constexpr):
    """-> z of columns, anything where they are not `real`, and the derivative of the softcap"""
    z = tl.load(logits_ptr + columns, mask=readable, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=real, other=0.0).to(tl.float32)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAPPED:
        tanh = _tanh(z / softcap)
        slope = 1.0 - tanh * tanh
        z = softcap * tanh
    return z * inverse_temperature, slope


@triton.jit
def softmax_gradient_kernel(
    logits_ptr,  # (n, V) fp32, rows `stride` elements apart
    stride,
    gradient_ptr,  # rows `gradient_stride` elements apart, the same memory as the logits or not; None: no gradient
    gradient_stride,
    targets_ptr,  # (n,) int64
    upstream_ptr,  # (n,) fp32
    bias_ptr,  # (V,), or None
    token_ptr,  # (n,) fp32
    lse_ptr,  # (n,) fp32
    flag_ptr,  # (1,) int32
    vocabulary,
    softcap,
    inverse_temperature,
    CAPPED: tl.constexpr,
    KNOWN_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    wanted = tl.load(targets_ptr + row)
    inside = (wanted >= 0) & (wanted < vocabulary)
    target = tl.where(inside, wanted, -1).to(tl.int32)  # as columns are: a comparison of int64 is two instructions
    lanes = tl.arange(0, BLOCK)

    if KNOWN_LSE:
        shift = tl.load(lse_ptr + row)
        scale = 1.0
        rest = 0.0
    else:
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            real = columns < vocabulary
            z, _ = _logits(logits_ptr, bias_ptr, columns, columns < stride, real, softcap, inverse_temperature, CAPPED)
            z = tl.where(real & (columns != target), z, -float("inf"))
            above = z - largest
            exponential = tl.exp(-tl.abs(above))
            sums = tl.where(above > 0.0, sums * exponential + 1.0, sums + exponential)
            largest = tl.where(above > 0.0, z, largest)  # not a NaN, which the sum has

        z_target, _ = _logits(logits_ptr, bias_ptr, target, inside, inside, softcap, inverse_temperature, CAPPED)
        shift = tl.maximum(tl.max(largest, 0), z_target)
        others = tl.sum(sums * tl.exp(largest - shift), 0)
        total = others + tl.exp(z_target - shift)
        total = tl.where(inside, total, float("nan"))
        tl.store(flag_ptr, 1, mask=(wanted < 0) | (wanted >= vocabulary))
        tl.store(token_ptr + row, (z_target - shift) - tl.log(total))
        tl.store(lse_ptr + row, shift + tl.log(total))
        scale = 1.0 / total
        rest = others / total  # 1 - p of the target

    if gradient_ptr is not None:
        upstream = tl.load(upstream_ptr + row)
        factor = upstream * inverse_temperature
        gradient_ptr += row * gradient_stride
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            readable = columns < stride
            real = columns < vocabulary
            z, slope = _logits(  # pyright: ignore[reportGeneralTypeIssues]: called from Python it would raise
                logits_ptr, bias_ptr, columns, readable, real, softcap, inverse_temperature, CAPPED
            )
            p = tl.exp(z - shift) * scale
            at_target = 1.0 - p if KNOWN_LSE else rest
            gradient = tl.where(columns == target, at_target, -p) * (factor * slope)
            gradient = tl.where(upstream == 0.0, 0.0, gradient)
            # A gradient narrower than the logits lies where other threads have yet to read.
            tl.debug_barrier()
            tl.store(gradient_ptr + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=readable)


def softmax_gradient(
    logits: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    inverse_temperature: float,
    grad_dtype: torch.dtype,
    token: Tensor | None,
    lse: Tensor,
    flag: Tensor,
    known_lse: bool = False,
    gradient: Tensor | None = None,
) -> None:
    """As `row_chunks.RowKernels` says."""
    rows, vocabulary = logits.shape
    if vocabulary > MOST_COLUMNS:
        raise ValueError(f"softmax_gradient: logits must have at most {MOST_COLUMNS} columns, got {vocabulary}")
    if not rows:
        return
    stride = logits.stride(0)
    if upstream is not None and gradient is None:
        gradient = logits.as_strided((rows, stride), (stride, 1)).view(grad_dtype)
    config = for_rows(vocabulary, gradient is not None and gradient.dtype == torch.float32)
    options: dict[str, Any] = {
        "CAPPED": softcap != 0,
        "KNOWN_LSE": known_lse,
        "BLOCK": config.block,
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    softmax_gradient_kernel[(rows,)](
        logits,
        stride,
        gradient,
        0 if gradient is None else gradient.stride(0),
        targets,
        upstream,
        bias,
        token,
        lse,
        flag,
        vocabulary,
        softcap,
        inverse_temperature,
        **options,
    )
