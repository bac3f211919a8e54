"""Whether the ranks are at the same place. What each should have alike is gathered in small, and who differs is named.

Of a tensor a sum is taken: of its bits as integers, each times an odd number of its own, modulo 2^64. It is computed where the tensor is,
in any order to the same value, and a change of one element, or an exchange of two, changes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from l3ms.ranks.group import gather

BLOCK = 1 << 22  # elements whose bits are widened at a time
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Disagreement(RuntimeError):
    """Ranks that should be alike are not."""


class Difference(NamedTuple):
    """What a rank has, and what most others have."""

    field: str
    rank: int
    value: Any
    usual: Any


def differences(values: Mapping[str, Any]) -> list[Difference]:
    """Where this rank's `values` (what JSON can write) and those of the others differ, on all ranks the same; empty where nowhere."""
    found = gather({name: json.dumps(value, sort_keys=True) for name, value in values.items()})
    rows = []
    for field in dict.fromkeys(name for part in found for name in part):
        column = [part.get(field, "null") for part in found]
        usual = usual_of(column)
        rows += [
            Difference(field, rank, json.loads(text), json.loads(usual))
            for rank, text in enumerate(column)
            if text != usual
        ]
    return rows


def usual_of(column: Sequence[Any]) -> Any:
    """What most have; of as many that of the lowest rank."""
    return Counter(column).most_common(1)[0][0]


@torch.no_grad()
def same_tensors(named: Mapping[str, Tensor], what: str, group: Any = None) -> None:
    """RuntimeError on every rank, naming those that differ, where a tensor is not the same on all, bit for bit."""
    if not named or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    own = torch.stack([bits(tensor) for tensor in named.values()])
    table = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(table, own, group=group)
    rows = torch.stack(table).cpu()
    if bool((rows == rows[0]).all()):
        return
    usual = torch.tensor(usual_of([tuple(row) for row in rows.tolist()]))
    names, said = list(named), []
    for rank, row in enumerate(rows):
        wrong = [name for name, other in zip(names, (row != usual).tolist(), strict=True) if other]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            place = rank if group is None else dist.get_global_rank(group, rank)
            said.append(f"rank {place} in {wrong[0]}{more}")
    raise Disagreement(
        f"{what}: {', '.join(said)} differs from the other ranks; what they have computed since they agreed is not one run"
    )


def bits(tensor: Tensor) -> Tensor:
    """() int64, of every bit of `tensor` and where it is."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    words = flat.view(WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(words), BLOCK):
        part = words[start : start + BLOCK].long()
        place = torch.arange(start, start + len(part), device=flat.device)
        total += (part * (2 * (place * 0x9E3779B1 % (1 << 31)) + 1)).sum()
    return total
