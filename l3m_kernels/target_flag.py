"""Targets outside the vocabulary, found by kernels: told to the caller without making the host wait for the device.

A kernel makes the row NaN and sets a flag on the device. After each call the flag is copied to the host behind it; the first call that
finds the copy done and set raises. `check_targets` waits, and is the way to find the call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Flag:
    device: Tensor  # (1,) int32, 1 once a kernel met such a target
    host: Tensor  # (1,) int32, pinned
    copied: "torch.cuda.Event | None" = None  # after the newest copy


_flags: dict[torch.device, _Flag] = {}


def flag(device: torch.device) -> Tensor:
    """(1,) int32 on `device`, for a kernel to set to 1."""
    if device.type != "cuda":  # there the targets were looked at before
        return torch.zeros(1, dtype=torch.int32, device=device)
    if device not in _flags:
        zero = torch.zeros(1, dtype=torch.int32)
        _flags[device] = _Flag(zero.to(device), zero.pin_memory())
    return _flags[device].device


def copy_later(device: torch.device) -> None:
    """Send the flag to the host, behind the kernels that may set it. Not while a graph is captured: its replays set the flag."""
    found = _flags.get(device)
    if found is None or torch.cuda.is_current_stream_capturing():
        return
    found.host.copy_(found.device, non_blocking=True)
    found.copied = torch.cuda.Event()
    found.copied.record()


def raise_if_set(op: str, device: torch.device, wait: bool = False) -> None:
    """Raise for an earlier call, if that can be known (`wait`: is known) by now. The flag is down afterwards.

    Raises:
        IndexError: a target outside [0, V) that is not `ignore_index`.
    """
    found = _flags.get(device)
    if found is None or (not wait and (torch.cuda.is_current_stream_capturing() or found.copied is None)):
        return
    if wait:
        found.host.copy_(found.device)
    elif found.copied is None or not found.copied.query():
        return
    if int(found.host[0]):
        found.copied = None
        found.host.zero_()
        found.device.zero_()
        raise IndexError(
            f"{op}: an earlier call on {device} had a target outside the vocabulary [0, V) that is not ignore_index; its rows are NaN. "
            "l3m_kernels.check_targets() after a call says whether it was that one"
        )


def check_targets(device: torch.device | str | None = None) -> None:
    """Wait for a GPU, and raise if a target of the calls so far was outside the vocabulary.

    The head's ops do not wait for the device: they make the row of such a target NaN, and a later call raises this error.

    Args:
        device: a CUDA device; None is the current one. Where the targets are on a CPU nothing is left to check.

    Raises:
        IndexError: a target outside [0, V) that is not `ignore_index`.
    """
    where = torch.device("cuda" if device is None else device)
    if where.type == "cuda" and torch.cuda.is_initialized():
        where = torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)
        raise_if_set("check_targets", where, wait=True)
