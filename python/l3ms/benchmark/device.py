"""Time and memory on a CUDA device, measured there: by events around the work, and by the allocator's own peak.

Letters: n scored rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l3ms.benchmark.shapes import Case

FLUSH = 256 << 20  # bytes written before each measured call: more than any level-2 cache
FLUSHES = 8  # about a millisecond, in which the host gets ahead of the device
POISON = 8 << 30  # bytes of NaN that outputs and buffers are likely to be placed on


@functools.cache
def _flushed() -> Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device="cuda")


def clock(run: Callable[[Any], object], argument: Any) -> float:
    """Seconds of one call on the device, whose cache holds nothing of the inputs; what it returns is freed afterwards."""
    gc.collect()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(FLUSHES):
        _flushed().zero_()
    start.record()
    result = run(argument)
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


def peak(run: Callable[[Any], tuple[Tensor, ...]], batch: Any) -> int:
    """Bytes that `run(batch)` holds at its peak, without the tensors that it returns."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(batch)
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in found), 0)


def poison() -> None:
    """Fill free memory with NaN: what a contestant does not write is then no number."""
    size = min(POISON, torch.cuda.mem_get_info()[0] // 2)
    torch.empty(size // 4, device="cuda").fill_(torch.nan)


def missing() -> str | None:
    """Why nothing can be measured on a CUDA device here, or None."""
    if torch.cuda.is_available():
        return None
    return "torch is a build without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"


def name() -> str:
    return torch.cuda.get_device_name()


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, fp32 from 16-bit operands where out is fp32 and this torch can."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def forms(case: Case, rounds: int, time: Callable[[Callable[[Any], object], Any], float] = clock) -> dict[str, float]:
    """Median seconds of the products that the op cannot do without, each alone, on random numbers: the ceiling.

    NT: logits (n, V) fp32 = hidden @ weight.T; NN: d_hidden (n, D) = G @ weight; TN: d_weight (V, D) fp32 = G.T @ hidden.
    """
    n, D, V = case.scored, case.shape.hidden, case.shape.vocabulary
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    wide = torch.float32 if case.device == "cuda" else dtype  # a CPU's products have one dtype

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=case.device, dtype=dtype)

    def empty(rows: int, columns: int, kind: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, device=case.device, dtype=kind)

    hidden, weight = normal(n, D), normal(V, D)

    def measured(a: Tensor, b: Tensor, out: Tensor) -> float:
        product(a, b, out)
        return statistics.median(time(lambda _: product(a, b, out), None) for _ in range(rounds))

    found = {"NT": measured(hidden, weight.t(), empty(n, V, wide))}
    if case.op == "no-grad":
        return found
    gradient = normal(n, V)
    found["NN"] = measured(gradient, weight, empty(n, D, dtype))
    if case.op != "frozen":
        found["TN"] = measured(gradient.t(), hidden, empty(V, D, wide))
    return found
