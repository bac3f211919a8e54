"""Streams of random numbers: each rank samples from one of its own.

Ranks that begin with one seed, as torch's users let them, would give equal answers to equal prompts, and the standard errors take answers
for independent. So where there are several, a rollout draws from a generator of a seed (of the call, or of torch's global generator, which
goes on by one number on each rank, whatever they sample: dropout stays in step) and of the rank among those with other batches. Nothing of
it is kept: the same seed on as many ranks gives the same responses, on a CPU bit for bit; on another number of ranks it gives others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from l3ms.model.random_numbers import stream
from l3ms.model.sharding import groups_with_one_batch, several_ranks


@contextmanager
def own_stream(model: Any, seed: int | None = None, process_group: Any = None) -> Iterator[None]:
    """What is drawn inside, from torch's global generator, is of this rank's stream; after it that generator is where it was.

    One process without a `seed` draws from the global generator itself.

    Args:
        process_group: ranks with batches of their own; by default those that do not share the model by tensor parallelism with this one.

    Raises:
        ValueError: parts of the model lie on several dimensions of a mesh that are not data parallel, so that has to be said.
    """
    if not several_ranks():
        if seed is None:
            yield
            return
        place = 0
    else:
        seed, place = _of_rank(model, seed, process_group)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(stream("l3ms rollout", seed, place))
        yield


def _of_rank(model: Any, seed: int | None, process_group: Any) -> tuple[int, int]:
    """The seed, and a number that the ranks with one batch have in common and no other has."""
    drawn = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    if process_group is not None:
        return drawn, dist.get_rank(process_group)
    groups = groups_with_one_batch(model)
    if not groups:
        return drawn, dist.get_rank()
    if len(groups) > 1:
        raise ValueError(
            f"rollout: the model is in parts over {len(groups)} dimensions of a mesh; give process_group=, the ranks with batches of "
            'their own (mesh["dp"].get_group())'
        )
    ranks = dist.get_process_group_ranks(groups[0])
    if seed is None:  # the global generators of these ranks need not agree
        shared = [drawn]
        dist.broadcast_object_list(shared, src=ranks[0], group=groups[0])
        (drawn,) = shared
    return drawn, min(ranks)
