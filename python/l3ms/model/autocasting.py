"""The model without the autocast that accelerate wraps its forward in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from l3ms.model.inside_adapters import inside_adapters


def has_bfloat16_products() -> bool:
    """Whether the CPU computes products of bfloat16 with instructions made for it, or at least with those of float32.

    Without AVX-512 torch converts number by number: 8 GFLOP/s a core instead of 58 (AMD EPYC of 2021, 1024 x 576 x 1536, torch 2.13).
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def wrapped(module: Any) -> bool:
    """Whether accelerate's autocast is around its forward."""
    return "_original_forward" in vars(module) and "forward" in vars(module)


@contextmanager
def outside_autocast(model: Any) -> Iterator[None]:
    """accelerate wraps the forward in an autocast, which casts the weights again at every token of a response.

    Kept where the model does not run without it (adapters and norms in other dtypes than the rest).
    """
    inside = [m for m in dict.fromkeys([model, inside_adapters(model)]) if wrapped(m)]
    kind = model.device.type
    before = [vars(m)["forward"] for m in inside]
    try:
        for m in inside:
            m.forward = m._original_forward
        with torch.autocast(kind, enabled=False):
            alone = not (inside or torch.is_autocast_enabled(kind)) or _runs(model)
            if alone:
                yield
                return
        for m, forward in zip(inside, before, strict=True):
            m.forward = forward
        yield
    finally:
        for m, forward in zip(inside, before, strict=True):
            m.forward = forward


@torch.no_grad()
def _runs(model: Any) -> bool:
    try:
        ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except RuntimeError:
        return False
    return True
