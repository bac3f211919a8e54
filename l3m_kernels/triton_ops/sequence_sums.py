"""Log-likelihoods of tokens to those of sequences: one program a sequence, so no atomics and the same bits every time."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3m_kernels.triton_ops.configs import SEQUENCES


@triton.jit
def sequence_sums_kernel(
    token_ptr,  # (T,) fp32
    targets_ptr,  # (T,) int64
    cu_seqlens_ptr,  # (N + 1,) int32 | int64
    sequence_ptr,  # (N,) fp64
    length_ptr,  # (N,) int64
    tokens,
    ignore_index,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    # Offsets on a GPU are not checked before: none may lead outside.
    first = tl.maximum(tl.load(cu_seqlens_ptr + sequence).to(tl.int64), 0)
    last = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), tokens)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int64)
    for start in range(first, last, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        mask = positions < last
        sums += tl.load(token_ptr + positions, mask=mask, other=0.0).to(tl.float64)
        target = tl.load(targets_ptr + positions, mask=mask, other=0)
        counts += (mask & (target != ignore_index)).to(tl.int64)
    tl.store(sequence_ptr + sequence, tl.sum(sums, 0))
    tl.store(length_ptr + sequence, tl.sum(counts, 0))


def sequence_sums(token: Tensor, targets: Tensor, cu_seqlens: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """-> (N,) float64 sums of token (T,), (N,) int64 tokens that are scored."""
    count = len(cu_seqlens) - 1
    sequence = torch.empty(count, dtype=torch.float64, device=token.device)
    length = torch.empty(count, dtype=torch.int64, device=token.device)
    options: dict[str, Any] = {"BLOCK": SEQUENCES.block, "num_warps": SEQUENCES.warps, "enable_fp_fusion": True}
    if count:
        sequence_sums_kernel[(count,)](
            token,
            targets.contiguous(),
            cu_seqlens.contiguous(),
            sequence,
            length,
            len(token),
            ignore_index,
            **options,
        )
    return sequence, length
