"""What was wrong with the values of a call, found on the device: told to the caller without making the host wait for it.

A kernel makes NaN of what it cannot answer and sets a flag on the device. After each call the flags are copied to the host behind it; the
first call that finds the copy done and a flag set raises. `check_targets` waits, and is the way to find the call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# name of a flag -> what is raised, and what the earlier call had
FAULTS: dict[str, tuple[type[Exception], str]] = {
    "targets": (IndexError, "a target outside the vocabulary [0, V) that is not ignore_index; its rows are NaN"),
    "scored": (
        ValueError,
        "a `scored` that is not the number of its targets other than ignore_index; its results are NaN",
    ),
    "cu_seqlens": (
        ValueError,
        "cu_seqlens that do not start at 0, end at T (the rows of hidden) and never decrease; its sequences and gradients are NaN",
    ),
}
_PLACE = {name: place for place, name in enumerate(FAULTS)}


@dataclass
class _Flags:
    device: Tensor  # (F,) int32, in the order of FAULTS, 1 once a kernel met the fault
    host: Tensor  # (F,) int32, pinned
    copied: "torch.cuda.Event | None" = None  # after the newest copy


_flags: dict[torch.device, _Flags] = {}


def flag(device: torch.device, fault: str) -> Tensor:
    """(1,) int32 on `device`, for a kernel to set to 1.

    Raises:
        RuntimeError: the first call on a GPU, which makes them, is made while a CUDA graph is captured.
    """
    place = _PLACE[fault]
    if device.type != "cuda":  # there the values were looked at before
        return torch.zeros(1, dtype=torch.int32, device=device)
    if device not in _flags:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"l3m_kernels: the first call on {device} cannot be captured into a CUDA graph, since it makes what later calls use; "
                "call the op once before the capture"
            )
        zero = torch.zeros(len(FAULTS), dtype=torch.int32)
        _flags[device] = _Flags(zero.to(device), zero.pin_memory())
    return _flags[device].device[place : place + 1]


def copy_later(device: torch.device) -> None:
    """Send the flags to the host, behind the kernels that may set them. Not while a graph is captured: its replays set the flags."""
    found = _flags.get(device)
    if found is None or torch.cuda.is_current_stream_capturing():
        return
    found.host.copy_(found.device, non_blocking=True)
    found.copied = torch.cuda.Event()
    found.copied.record()


def raise_if_set(op: str, device: torch.device, wait: bool = False) -> None:
    """Raise for an earlier call, if that can be known (`wait`: is known) by now. The flag that was told is down afterwards.

    Raises:
        IndexError: a target outside [0, V) that is not `ignore_index`.
        ValueError: a count of scored rows that was given and is wrong, or wrong offsets of the sequences.
    """
    found = _flags.get(device)
    if found is None:
        return
    if wait:
        found.host.copy_(found.device)
    elif torch.cuda.is_current_stream_capturing() or found.copied is None or not found.copied.query():
        return
    for name, (error, what) in FAULTS.items():
        place = _PLACE[name]
        if int(found.host[place]):
            found.copied = None  # another flag is told by the next call
            found.host[place].zero_()
            found.device[place].zero_()
            raise error(
                f"{op}: an earlier call on {device} had {what}. "
                "l3m_kernels.check_targets() after a call says whether it was that one"
            )


def check_targets(device: torch.device | str | None = None) -> None:
    """Wait for a GPU, and raise if the targets of the calls so far, or their `scored` or cu_seqlens, were not what they should be.

    The head's ops do not wait for the device: they make NaN of what such targets touch, and a later call raises this error.

    Args:
        device: a CUDA device; None is the current one. Where the targets are on a CPU nothing is left to check.

    Raises:
        IndexError: a target outside [0, V) that is not `ignore_index`.
        ValueError: a call was given a `scored` that is not the number of its scored targets, or cu_seqlens on the GPU that do not start
            at 0, end at T and never decrease.
    """
    where = torch.device("cuda" if device is None else device)
    if where.type == "cuda" and torch.cuda.is_initialized():
        where = torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)
        raise_if_set("check_targets", where, wait=True)
