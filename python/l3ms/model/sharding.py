"""Models of which each process holds a part: fully_shard (FSDP2) and DTensors. What is the same for all who use one.

A rank with a part makes every forward together with the others, which wait for its part in a gather: so all make as many. After a forward
without a backward fully_shard leaves the outermost module's weights whole, as other tensors than those that are trained: `reshard` puts
these back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l3ms.model.inside_adapters import inside_adapters
from l3ms.ranks.group import world

_FSDP2 = (
    "use fully_shard (FSDP2), which accelerate takes as fsdp_version=2 and transformers as fsdp_config={'version': 2}"
)


def fully_sharded(model: nn.Module) -> Iterator[Any]:
    """The modules that fully_shard was called on."""
    return (module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard"))


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of it, so that each takes every forward with the others."""
    if not several_ranks():
        return False
    return any(map(in_shards, model.parameters())) or next(fully_sharded(model), None) is not None


def several_ranks() -> bool:
    return world() > 1


def in_shards(parameter: Any) -> bool:
    """Whether this process has a part of it only, in whatever form: a DTensor, what FSDP1 has flattened, ZeRO-3's."""
    return is_part(parameter) or hasattr(parameter, "ds_id") or getattr(parameter, "_fsdp_flattened", False)


def is_part(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """This process's part, which shares its memory."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of it, on each rank; ranks gather it together."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def as_placed(tensor: Tensor, like: Any) -> Tensor:
    """A `tensor` that each rank has all of, as `like`: of a DTensor this rank's part, which costs no communication."""
    if not is_part(like) or is_part(tensor):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Parameters are those that are trained, also after a forward that no backward followed. Not between a forward and its backward."""
    for module in fully_sharded(model):
        module.reshard()


def computed_in(model: nn.Module) -> set[torch.dtype]:
    """The dtypes that fully_shard's mixed precision casts to."""
    policies = [module._get_fsdp_state()._mp_policy for module in fully_sharded(model)]
    return {kind for policy in policies for kind in (policy.param_dtype, policy.output_dtype) if kind is not None}


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """`generate` of adapters calls the model inside of them: what fully_shard does around the outermost forward is done around it."""
    if not hasattr(model, "unshard") or inside_adapters(model) is model or "generate" in vars(model):
        yield
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        del model.generate


def most(model: nn.Module, count: int) -> int:
    """The largest `count` of all ranks, where they make forwards together; else this one's."""
    if not is_sharded(model):
        return count
    largest = torch.tensor(count, device=_of_collectives(model))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def any_rank(model: nn.Module, here: bool) -> bool:
    """`here` on one of the ranks that make forwards together."""
    return bool(most(model, int(here)))


def check_flat(model: nn.Module, where: str) -> None:
    """Raises `ValueError` for weights that are in parts without being tensors of their own shapes: FSDP1, ZeRO-3."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(f"{where}: FullyShardedDataParallel (FSDP1) flattens the weights; {_FSDP2}")
    check_whole_parameters(model.parameters(), where)


def check_whole_parameters(parameters: Iterable[Any], where: str) -> None:
    """The same, of parameters."""
    for parameter in parameters:
        if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_is_flat_param", False):
            raise ValueError(f"{where}: FullyShardedDataParallel (FSDP1) flattens the weights; {_FSDP2}")
        if hasattr(parameter, "ds_id"):
            raise ValueError(f"{where}: DeepSpeed ZeRO-3 keeps no weight in its own shape; {_FSDP2}")


def groups_with_one_batch(model: nn.Module) -> list[Any]:
    """Groups of ranks that hold parts of what each of them computes (tensor parallel), with this rank in them: they share a batch."""
    data = {ranks for module in fully_sharded(model) for ranks in _data_parallel(module)}
    found: dict[tuple[int, ...], Any] = {}
    parts: list[Any] = [parameter for parameter in model.parameters() if is_part(parameter)]
    for mesh in (part.device_mesh for part in parts):
        for dimension in range(mesh.ndim):
            group = mesh.get_group(dimension)
            found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    return [group for ranks, group in found.items() if ranks not in data and len(ranks) > 1]


def _data_parallel(module: Any) -> Iterator[tuple[int, ...]]:
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for name in ("shard_process_group", "replicate_process_group"):
            process_group = getattr(group.mesh_info, name, None)
            if process_group is not None:
                yield tuple(dist.get_process_group_ranks(process_group))


def _of_collectives(model: nn.Module) -> torch.device:
    """Where numbers that are sent are: offloaded weights say CPU, and NCCL sends none from there."""
    device = next(model.parameters()).device
    if device.type == "cpu" and "nccl" in str(dist.get_backend()) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
