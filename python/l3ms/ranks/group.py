"""What the processes of a training tell each other: one does something for all, all do a part each, one waits for the others.

Where torch.distributed has not been initialised this process is alone, and each of these is what it says of one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from l3ms.ranks import lookout
from l3ms.ranks.launched import launched

T = TypeVar("T")

BROKEN_OFF = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
LATER = 5  # seconds by which a collective waits longer than the lookout, which can say for whom


class Elsewhere(Exception):
    """Of an error that tells of another rank's: that one says why."""


class OtherRankRefused(Elsewhere, ValueError):
    """Another rank was given what it cannot take."""


class OtherRankFailed(Elsewhere, RuntimeError):
    """Something went wrong on another rank."""


def is_elsewhere(error: BaseException | None) -> bool:
    """Whether an error tells of another rank: one of ours that says so, or a collective that broke off."""
    while error is not None:
        text, broken = str(error), getattr(dist, "DistError", Elsewhere)
        if isinstance(error, (Elsewhere, broken)) or any(part in text for part in BROKEN_OFF):
            return True
        error = error.__cause__ or error.__context__
    return False


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def join(seconds: float, *, on_cpu: bool) -> None:
    """Make one of the processes that were started together; nothing to do for one that is alone, or has been made one.

    Args:
        seconds: that one waits for the others, at most.
        on_cpu: the models are there, whatever devices there are.
    """
    place = launched()
    if place is None or dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # accelerate looks for it
    watching = lookout.current()
    backend = "gloo"
    if not on_cpu:
        if place.local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"process {place.local_rank} of this machine has no GPU, there are {count}: start as many (--nproc-per-node), or set "
                "train.device: cpu"
            )
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {
        "rank": place.rank,
        "world_size": place.world,
        "timeout": timedelta(seconds=seconds + LATER),
    }
    if watching is not None:
        watching.seconds = seconds
        options["store"] = watching.store
    dist.init_process_group(backend, **options)


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """`value` of each rank."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def of_first(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on all of them. An error there is one on all."""
    if world() == 1:
        return function()
    answer: list[Any] = [None, None]
    try:
        if is_first():
            answer[1] = function()
    except BaseException as error:
        answer[0] = str(error) or type(error).__name__
        raise
    finally:
        dist.broadcast_object_list(answer, 0)
    if answer[0] is not None:
        raise OtherRankFailed(f"rank 0: {answer[0]}")
    return answer[1]


def wait() -> None:
    """For all."""
    if world() > 1:
        gather(None)


@contextmanager
def first_of_machine_first() -> Iterator[None]:
    """One process of each machine before the others of it: what fills a cache there, or fetches."""
    if world() == 1:
        yield
        return
    machines = gather(socket.gethostname())
    ahead = machines.index(machines[rank()]) == rank()
    if not ahead:
        wait()
    try:
        yield
    finally:
        if ahead:
            wait()
