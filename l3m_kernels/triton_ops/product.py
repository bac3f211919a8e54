"""A product of fp32 matrices in fp32, whatever the program allows torch's products: for programs that allow TF32, slower than cuBLAS."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3m_kernels.triton_ops.configs import PRODUCT


@triton.jit
def product_kernel(
    a_ptr,  # (M, K) fp32, of any strides
    b_ptr,  # (K, N) fp32, likewise
    out_ptr,  # (M, N) fp32, likewise
    rows,
    columns,
    depth,
    a_row,
    a_column,
    b_row,
    b_column,
    out_row,
    out_column,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,  # rows and columns of a tile
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK)  # next to each other: they share a part of b
    tile = tl.program_id(0).to(tl.int64)
    row = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
    column = (tile // tiles) * BLOCK + tl.arange(0, BLOCK)
    is_row, is_column = row[:, None] < rows, column[None, :] < columns
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH).to(tl.int64)
        a = tl.load(a_ptr + row[:, None] * a_row + k[None, :] * a_column, mask=is_row & (k[None, :] < depth), other=0.0)
        b = tl.load(
            b_ptr + k[:, None] * b_row + column[None, :] * b_column, mask=is_column & (k[:, None] < depth), other=0.0
        )
        total += tl.dot(a, b, input_precision="ieee")
    there = is_row & is_column
    out_ptr += row[:, None] * out_row + column[None, :] * out_column
    if ACCUMULATE:
        total += tl.load(out_ptr, mask=there, other=0.0)
    tl.store(out_ptr, total, mask=there)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (m, n) = a (m, k) @ b (k, n), or += it; all fp32."""
    (rows, depth), columns = a.shape, b.shape[1]
    if not rows or not columns:
        return
    grid = triton.cdiv(rows, PRODUCT.block) * triton.cdiv(columns, PRODUCT.block)
    sizes: dict[str, Any] = dict(zip(("rows", "columns", "depth"), (rows, columns, depth), strict=True))
    for name, matrix in (("a", a), ("b", b), ("out", out)):
        sizes |= {f"{name}_row": matrix.stride(0), f"{name}_column": matrix.stride(1)}
    options: dict[str, Any] = {
        "ACCUMULATE": accumulate,
        "BLOCK": PRODUCT.block,
        "DEPTH": PRODUCT.depth,
        "num_warps": PRODUCT.warps,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(a):
        product_kernel[(grid,)](a, b, out, **sizes, **options)
