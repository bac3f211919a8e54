"""Which linear product a head's module computes: that of a plain `nn.Linear`, or of one that PEFT has put an adapter on.

A head's module may be replaced at any time (PEFT does), so this is asked at every call: what is not known here is refused, never skipped.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Product(NamedTuple):
    """logits = hidden @ weight.T + bias"""

    hidden: Tensor  # (..., D), of LoRA (..., D + r)
    weight: Tensor  # (V, D), of LoRA (V, D + r)
    bias: Tensor | None  # (V,)


def head_module(model: Any) -> nn.Module:
    """The module of the model's head whose forward computes the product.

    Raises:
        ValueError: there is none, or it does more than a product that is known here; names the class and the way out.
    """
    head = model.get_output_embeddings()
    module = _active(head)
    if not _is_linear(module) and not _is_lora(module) and not _is_trainable_tokens(module):
        name, kind = type(model).__name__, type(module).__name__
        if type(module).__module__.startswith("peft."):
            method = type(module).__module__.split(".")[2]
            raise ValueError(
                f"fuse_head: {name} has an adapter on lm_head that is not supported ({kind} of peft's {method}): "
                "leave lm_head out of the adapter's target modules, or use plain LoRA or modules_to_save there"
            )
        raise ValueError(f"fuse_head: {name} has no plain linear output head (got {kind}); it cannot be used")
    mesh = getattr(_linear(module).weight, "device_mesh", None)
    if mesh is not None and "tp" in (mesh.mesh_dim_names or ()) and not _is_linear(module):
        raise ValueError(
            f"fuse_head: {type(model).__name__} has an adapter ({type(module).__name__}) on a tensor-parallel lm_head: leave lm_head "
            "out of the adapter's target modules, or load the model without a tp_plan for lm_head"
        )
    return module


def head_rows(module: nn.Module) -> int:
    """V of a `head_module`."""
    return _linear(module).weight.shape[0]


def _linear(module: Any) -> Any:
    while not _is_linear(module):
        module = module.base_layer
    return module


def product(module: Any, hidden: Tensor) -> Product:
    """What the module, a `head_module`, makes of `hidden`, with what is trained of it differentiable."""
    if _is_linear(module):
        return Product(hidden, module.weight, module.bias)
    base = module.base_layer
    if module.disable_adapters or module.merged:
        if module.disable_adapters and module.merged:
            module.unmerge()  # as its own forward does
        return Product(hidden, base.weight, base.bias)
    if _is_trainable_tokens(module):
        return Product(hidden, module.get_merged_weights(module.active_adapters), None)  # as its own forward: no bias
    hiddens, weights, bias = [hidden], [base.weight], base.bias
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        down, up = module.lora_A[name], module.lora_B[name]
        low = down(module.lora_dropout[name](hidden.to(down.weight.dtype))) * module.scaling[name]
        hiddens.append(low.to(hidden.dtype))
        weights.append(up.weight.to(base.weight.dtype))
        if up.bias is not None:
            added = up.bias * module.scaling[name]
            bias = added.to(base.weight.dtype) if bias is None else bias + added.to(bias.dtype)
    return Product(torch.cat(hiddens, -1), torch.cat(weights, 1), bias)


def is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor where the head's module computes: that of tensor parallelism, for FSDP has gathered its own by then."""
    return getattr(weight, "placements", None) is not None


def _active(module: Any) -> Any:
    """Through the wrappers of PEFT that only choose whom to call."""
    while type(module).__module__ == "peft.utils.other":
        kind = type(module).__name__
        if kind == "ModulesToSaveWrapper":
            chosen = [name for name in module.active_adapters if name in module.modules_to_save]
            passed = module.disable_adapters or not chosen
            module = module.original_module if passed else module.modules_to_save[chosen[0]]
        elif kind == "TrainableTokensWrapper":
            module = module.token_adapter
        else:
            break
    return module


def _is_linear(module: Any) -> bool:
    """Not its subclasses that compute something else: quantized ones keep other numbers in `weight`."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_lora(module: Any) -> bool:
    """Plain LoRA: a variant (DoRA, ...) of an adapter that is in use is another product."""
    peft: Any = sys.modules.get("peft.tuners.lora.layer")
    return (
        peft is not None
        and type(module) is peft.Linear
        and _is_linear(module.base_layer)
        and not any(name in module.lora_variant for name in module.active_adapters)
    )


def _is_trainable_tokens(module: Any) -> bool:
    peft: Any = sys.modules.get("peft.tuners.trainable_tokens.layer")
    return peft is not None and type(module) is peft.TrainableTokensLayer and _is_linear(module.base_layer)
