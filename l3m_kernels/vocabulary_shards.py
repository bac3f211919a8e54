"""A rank's part of the vocabulary: from its own rows and a group, or from a DTensor; and what the ranks must agree on before they compute.

Letters: V vocabulary, D hidden size, p ranks of the group.

A rank that raises alone leaves the others waiting in the next collective. So the first call with a weight gathers, in one collective of
720 bytes per rank, what each rank was given: the rows that it holds, what must be equal, and what it refuses, if anything; all ranks then
go on, or all raise the same line. Later calls with that weight (the same object) gather nothing and trust that this stays so.
"""

import sys
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_FIELDS, _TEXT = 16, 592  # int64 numbers, bytes of a message


class Shard(NamedTuple):
    """A rank's rows of the vocabulary matrix."""

    weight: Tensor  # (V_r, D), which may be empty
    bias: Tensor | None  # (V_r,)
    group: Any  # the process group whose ranks hold the other rows


class Place(NamedTuple):
    """Where a rank's rows are in the vocabulary."""

    first: int
    vocabulary: int  # V


def is_dtensor(tensor: Any) -> bool:
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    made = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # who has one has imported it
    return made is not None and isinstance(tensor, made)


def group_of(op: str, weight: Any, group: Any) -> Any:
    """The group that shares the vocabulary.

    Raises:
        ValueError: there is none, this rank is not in it, or a DTensor's placements are no shards of the vocabulary.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{op}: torch.distributed has no process group; call init_process_group first")
    if not is_dtensor(weight):
        group = dist.group.WORLD if group is None else group
        if dist.get_rank(group) < 0:
            raise ValueError(f"{op}: this rank is not in `group`; call it on the group's ranks only")
        return group
    if group is not None:
        raise ValueError(f"{op}: group must be None for a DTensor, whose mesh says which ranks share it")
    return weight.device_mesh.get_group(_vocabulary_dimension(op, weight))


def shard_of(op: str, weight: Any, bias: Any, group: Any) -> Shard:
    """The rank's rows, differentiable: gradients come back as they were given, of a DTensor with its placements."""
    if not is_dtensor(weight):
        if is_dtensor(bias):
            raise ValueError(f"{op}: bias is a DTensor and weight is not; pass bias.to_local()")
        return Shard(weight, bias, group)
    if bias is not None and not (is_dtensor(bias) and _layout(bias) == _layout(weight)):
        raise ValueError(
            f"{op}: bias must be a DTensor of weight's mesh and placements {weight.placements}, "
            f"got {getattr(bias, 'placements', type(bias).__name__)}"
        )
    along = _vocabulary_dimension(op, weight)
    rows = [_rows(tensor, along) for tensor in (weight, bias) if tensor is not None]
    chunk = -(-weight.shape[0] // weight.device_mesh.size(along))
    first = min(weight.device_mesh.get_local_rank(along) * chunk, weight.shape[0])
    expected = min(chunk, weight.shape[0] - first)
    if rows[0].shape[0] != expected:
        raise ValueError(
            f"{op}: weight must be sharded as torch.chunk does, {expected} rows here, got {rows[0].shape[0]}; "
            "make it with distribute_tensor"
        )
    return Shard(rows[0], rows[1] if rows[1:] else None, group)


def replicated(op: str, name: str, tensor: Any) -> Any:
    """A DTensor that is whole on every rank, as a plain tensor; a plain tensor is taken to be that."""
    if not is_dtensor(tensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"{op}: {name} must be the same on all ranks that share the vocabulary, got a DTensor {tensor.placements}; "
            f"pass {name}.redistribute(placements=[Replicate()] * {tensor.device_mesh.ndim})"
        )
    return tensor.to_local(grad_placements=tensor.placements)


def _layout(tensor: Any) -> tuple:
    return tensor.device_mesh, tuple(tensor.placements)


def _vocabulary_dimension(op: str, weight: Any) -> int:
    """Of the mesh: the one dimension that Shard(0) splits the rows over. Others replicate, or shard as FSDP does."""
    placements = weight.placements
    name = f"{op}: weight is a DTensor {tuple(placements)}"
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"{name}: sums that are not added up; redistribute it to Shard(0) first")
    found = [i for i, placement in enumerate(placements) if _kind(placement) == "rows"]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{name}: its rows are sharded over {len(found)} mesh dimensions, and it cannot be told which of them shares "
            "the hidden states; redistribute all but one to Replicate()"
        )
    if all(placement.is_replicate() for placement in placements):
        raise ValueError(f"{name}: whole on every rank; pass weight.to_local()")
    raise ValueError(f"{name}: its rows must be sharded over one mesh dimension; redistribute it to Shard(0)")


def _kind(placement: Any) -> str:
    """Of a placement: "rows", "other" shards (those of FSDP too, which splits what tensor parallelism has split), or "whole"."""
    if type(placement).__name__ == "_StridedShard":
        return "other"
    if placement.is_shard():
        return "rows" if placement.is_shard(0) else "other"
    return "whole"


def _rows(tensor: Any, along: int) -> Tensor:
    """This rank's rows, gathered over the other sharded mesh dimensions; there the gradient is scattered, and the mean, as in FSDP."""
    from torch.distributed.tensor import Partial, Replicate

    gathered = [i for i, placement in enumerate(tensor.placements) if i != along and _kind(placement) == "other"]
    if not gathered:
        return tensor.to_local(grad_placements=tensor.placements)
    whole = [Replicate() if i in gathered else placement for i, placement in enumerate(tensor.placements)]
    sums = [Partial() if i in gathered else placement for i, placement in enumerate(tensor.placements)]
    local = tensor.redistribute(placements=whole).to_local(grad_placements=sums)
    ranks = 1
    for i in gathered:
        ranks *= tensor.device_mesh.size(i)
    return _Mean.apply(local, ranks)


class _Mean(torch.autograd.Function):
    """Divides the gradient by the ranks whose gradients are added up next."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / ctx.ranks, None


# ---- agreement -------------------------------------------------------------------------------------------------------

_agreed: Any = WeakTensorKeyDictionary()  # weight -> {(group, rows, whether it has a bias): its place}


def fingerprint(targets: Tensor) -> Tensor:
    """() int64 below 2**22, which fp32 holds, of integers and their order, without making the host wait.

    Each is multiplied by a square of its own, modulo a prime. In a batch of less than 1.7 million one that is changed is seen, and two that
    change places; of other differences all but one in 4 million.
    """
    prime, first = 4194301, 1234567
    place = torch.arange(first, first + targets.numel(), device=targets.device)
    return (targets.reshape(-1).long() % prime * (place * place % prime) % prime).sum() % prime


def agree(
    op: str, weight: Tensor, shard: Shard | None, same: Mapping[str, Any], group: Any, problem: Exception | None
) -> Place:
    """Where this rank's rows are, after all ranks were found to be given what belongs together.

    Args:
        weight: the caller's, which says whether this was asked before.
        shard: None where there is a problem.
        same: what must be equal on all ranks: names, and numbers, what `repr` tells apart, or functions that find a number.
        problem: why this rank cannot go on.

    Raises:
        ValueError: a rank has a problem, which it names; or what must be equal is not.
    """
    rows = -1 if shard is None else shard.weight.shape[0]
    key = (tuple(dist.get_process_group_ranks(group)), rows, shard is not None and shard.bias is not None)
    known = _agreed.get(weight) if isinstance(weight, Tensor) else None
    if known is not None and (problem is not None or key in known):
        if problem is not None:
            raise problem
        return known[key]
    gathered, texts = _gather(rows, same, problem, group)
    for rank, text in enumerate(texts):
        if text:
            if problem is not None:
                raise problem
            raise ValueError(f"{op}: rank {rank} of the group refuses: {text.removeprefix(f'{op}: ')}")
    for column, name in enumerate(same, 1):
        found = [row[column] for row in gathered]
        if len(set(found)) > 1:
            other = next(rank for rank, value in enumerate(found) if value != found[0])
            raise ValueError(
                f"{op}: {name} must be the same on all ranks of the group, and rank {other} differs from rank 0; only rows of "
                "the vocabulary are shared out (is this group one of data parallelism?)"
            )
    mine = dist.get_rank(group)
    place = Place(sum(row[0] for row in gathered[:mine]), sum(row[0] for row in gathered))
    if place.vocabulary < 1:
        raise ValueError(f"{op}: weight must have at least one row (V >= 1) on some rank of the group, and has none")
    if known is None:
        _agreed[weight] = known = {}
    known[key] = place
    return place


def _gather(
    rows: int, values: Mapping[str, Any], problem: Exception | None, group: Any
) -> tuple[list[list[int]], list[str]]:
    """One collective -> of each rank: numbers, and what it refuses or ""."""
    found = [value() if callable(value) else value for value in values.values()]
    numbers = [rows, *(value if isinstance(value, int) else zlib.crc32(repr(value).encode()) for value in found)]
    assert len(numbers) <= _FIELDS
    mine = torch.zeros(_FIELDS + _TEXT // 8, dtype=torch.int64)
    mine[: len(numbers)] = torch.tensor(numbers)
    if problem is not None:
        text = " ".join(str(problem).split()).encode()[:_TEXT] or type(problem).__name__.encode()
        mine[_FIELDS:].view(torch.uint8)[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    if "gloo" not in dist.get_backend(group):
        mine = mine.to(torch.accelerator.current_accelerator())
    found = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather(list(found), mine, group=group)
    found = found.cpu()
    texts = [bytes(row[_FIELDS:].view(torch.uint8).tolist()).rstrip(b"\0").decode(errors="ignore") for row in found]
    return found[:, :_FIELDS].tolist(), texts
