"""Which processes share the batch that an `L3MOptimizer` observes, and what of a model's parts it can step on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from l3ms.model.sharding import check_whole_parameters, is_part


def group_of(parameters: Sequence[Any], process_group: Any) -> Any:
    """The ranks with batches of their own: those given, or all; None for a single process.

    Raises:
        ValueError: weights of FSDP1 or ZeRO-3; tensor parallelism, where it has to be said which ranks share a batch; weights on the CPU
            and no backend there.
    """
    check_whole_parameters(parameters, "L3MOptimizer")
    if not (dist.is_available() and dist.is_initialized()):
        return process_group
    if process_group is None:
        meshes: list[Any] = [parameter.device_mesh for parameter in parameters if is_part(parameter)]
        names = {name for mesh in meshes for name in mesh.mesh_dim_names or ()}
        if shared := sorted(names & {"tp", "cp", "sp"}):
            raise ValueError(
                f"process_group is missing: the weights are in parts over {', '.join(shared)}, whose ranks share a batch: every response "
                'would count several times; give those with batches of their own (mesh["dp"].get_group())'
            )
        process_group = dist.group.WORLD
    here = next(iter(parameters)).device.type
    if here == "cpu" and "cpu" not in dist.get_backend_config(process_group):
        raise ValueError(
            f"process_group has no backend for the CPU, where the weights are (offloaded?), got {dist.get_backend_config(process_group)}; "
            'init_process_group("cpu:gloo,cuda:nccl")'
        )
    return process_group


def gathered(weight: Any, process_group: Any) -> Tensor:
    """A head's matrix that data-parallel ranks hold in parts, whole; its gradient is the mean over the ranks, as fully_shard makes it.

    Parts of which every rank of one batch holds one (tensor parallel) stay what they are.
    """
    if not is_part(weight) or process_group is None:
        return weight
    ranks = set(dist.get_process_group_ranks(process_group))
    mesh: Any = weight.device_mesh
    if not set(mesh.mesh.flatten().tolist()) <= ranks:
        return weight
    from torch.distributed.tensor import Partial, Replicate

    everywhere = [Replicate()] * mesh.ndim
    return weight.redistribute(placements=everywhere).to_local(grad_placements=[Partial("avg")] * mesh.ndim)
