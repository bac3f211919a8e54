"""Linear layers of a model on a CPU with their weights packed as oneDNN wants them, for as long as it is sampled.

A decode step multiplies a few rows by every weight. `F.linear` arranges the weights anew at each call, which is most of its time there:
for 8 rows of SmolLM2-135M on one AVX-512 core 78 of the 112 ms of a step are products, and packed beforehand they take 41 (float32) or 23
(bfloat16). To pack all of them costs about two steps and a copy of the weights. Whole responses: bench/results/rollouts.md.

Adapters of LoRA in float32 are added to the packed copy; the model's own weights are not touched. In 16 bits the sum would round away
what an adapter has learnt, so there the layers below the adapters are packed, and the adapters go on beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from l3ms.model.autocasting import has_bfloat16_products

FEWEST_ROWS = 2  # of one row oneDNN is no faster
FEWEST_STEPS = 8  # that pay for packing
LEAST_WEIGHTS = (
    4 << 20
)  # of the demo's model, a million, a step is the dispatch of its operations: 6.6 ms as it is, 6.5 packed
ROOM = 2.0  # times the packed copy has to be free


@contextmanager
def packed_weights(model: nn.Module, *, rows: int, steps: int) -> Iterator[None]:
    """Inside of it the linear layers of a CPU model multiply by packed weights, where that pays. Without gradients, in eval mode.

    Args:
        rows: about as many are in a batch.
        steps: decode steps that are to come.
    """
    replaced: list[nn.Module] = []
    try:
        if _pays(model, rows, steps):
            _replace(model, rows, replaced)
        yield
    finally:
        for module in replaced:
            del module.forward


def _pays(model: nn.Module, rows: int, steps: int) -> bool:
    if rows < FEWEST_ROWS or steps < FEWEST_STEPS or not is_large(model):
        return False
    weights = list(model.parameters())
    if any(weight.device.type != "cpu" for weight in weights):
        return False
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    return psutil.virtual_memory().available > ROOM * sum(weight.nbytes for weight in weights)


def is_large(model: nn.Module) -> bool:
    """Whether products and caches take the time of its steps."""
    return sum(weight.numel() for weight in model.parameters()) >= LEAST_WEIGHTS


def _replace(model: nn.Module, rows: int, replaced: list[nn.Module]) -> None:
    inside: set[nn.Module] = set()  # of layers with adapters that are in the copy
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if module in inside or "forward" in vars(module):
            continue
        if (merged := _with_adapters(module)) is not None:
            weight, bias = merged
            inside.update(module.modules())
        else:
            weight, bias = _own(module)
        if weight is None:
            continue
        module.forward = _product(torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows), bias)
        replaced.append(module)


def _product(packed: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        return linear(x, packed, bias, "none", [], "")

    return forward


def _own(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Weight (out, in) and bias of a plain linear layer."""
    if type(module) not in (nn.Linear, Conv1D) or not _supported(module.weight):
        return None, None
    return (module.weight if type(module) is nn.Linear else module.weight.t()), module.bias


def _with_adapters(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer with plain LoRA in float32, the adapters added."""
    lora = sys.modules.get("peft.tuners.lora")  # not imported: no such layer
    if lora is None or type(module) is not lora.Linear or module.disable_adapters or module.merged:
        return None
    base = module.base_layer
    names = [name for name in module.active_adapters if name in module.lora_A]
    products = [part[name] for part in (module.lora_A, module.lora_B) for name in names]
    if type(base) is not nn.Linear or any(name in module.lora_variant for name in names):
        return None
    if any(type(part) is not nn.Linear or part.bias is not None for part in products):
        return None
    parts = (base, *products)
    if any(_hooked(part) or part.weight.dtype != torch.float32 or not _supported(part.weight) for part in parts):
        return None
    weight = base.weight.detach().clone()
    for name in names:
        weight += module.get_delta_weight(name)
    return weight, base.bias


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _supported(weight: Tensor) -> bool:
    if type(weight) not in (Tensor, nn.Parameter):  # quantized, or a shard
        return False
    if weight.dtype == torch.bfloat16:
        return has_bfloat16_products()
    if weight.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return weight.dtype == torch.float32
