"""Copies of models that fully_shard has split, which torch does not deepcopy; and a model split as another is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from l3ms.model.heads import take_over_head, unfused
from l3ms.model.inside_adapters import inside_adapters
from l3ms.model.sharding import fully_sharded, reshard, whole


@torch.no_grad()
def whole_copy(model: Any) -> Any:
    """A copy on each rank, all of it, on the CPU; a plain deepcopy where nothing is sharded. Ranks make it together.

    Raises:
        ValueError: quantized weights, of which only the parts can be kept.
    """
    if next(fully_sharded(model), None) is None:
        return copy.deepcopy(model)
    reshard(model)
    copied = _empty(model)
    made: dict[int, Tensor] = {}
    for name, tensor in _tensors(model):
        if id(tensor) not in made:
            value = whole(tensor.detach()).to("cpu", copy=True)
            trained = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(value, trained) if isinstance(tensor, nn.Parameter) else value
        place, _, last = plain_name(name).rpartition(".")
        setattr(copied.get_submodule(place), last, made[id(tensor)])
    take_over_head(copied, model)
    return copied.train(model.training)


def shard_like(other: nn.Module, model: nn.Module) -> None:
    """Split `other`, of which each rank has all, over the ranks of `model` by the same policies: its layers each, and the rest together."""
    from torch.distributed.fsdp import fully_shard

    root: Any = next(fully_sharded(model))
    state = root._get_fsdp_state()
    groups = [group for module in fully_sharded(model) for group in module._get_fsdp_state()._fsdp_param_groups]
    options = {
        "mesh": groups[0].mesh_info.mesh,
        "mp_policy": state._mp_policy,
        "offload_policy": groups[0].offload_policy,
    }
    layers = [m for kind in model.modules() if isinstance(kind, nn.ModuleList) for m in kind]
    split = any(layer in set(fully_sharded(model)) for layer in layers)
    for kind in list(other.modules()) if split else []:
        if isinstance(kind, nn.ModuleList):
            for layer in kind:
                fully_shard(layer, **options)
    fully_shard(other, **options)


def _empty(model: Any) -> Any:
    """Its modules, without weights."""
    inner = inside_adapters(model)
    if getattr(inner, "quantization_method", None) is not None:
        raise ValueError(f"{type(inner).__name__}: quantized weights in parts are not copied; give a whole model")
    with torch.device("meta"):
        base = unfused(type(inner))(copy.deepcopy(inner.config))
    base.generation_config = copy.deepcopy(inner.generation_config)
    if inner is model:
        return base
    from peft import get_peft_model

    adapted: Any = None
    for name, config in model.peft_config.items():
        config = copy.deepcopy(config)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # others look at the weights, which are not there
        with torch.device("meta"):
            if adapted is None:
                adapted = get_peft_model(base, config, adapter_name=name)
            else:
                adapted.add_adapter(name, config)
        adapted.peft_config[name] = copy.deepcopy(model.peft_config[name])
    adapted.base_model.set_adapter(list(model.active_adapters))
    return adapted


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, also under the second names of those that are tied."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def plain_name(name: str) -> str:
    """Without what checkpointing and compilation put into names."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
