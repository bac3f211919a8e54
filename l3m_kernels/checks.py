"""Arguments of the head's ops: what can be checked from shapes and dtypes (at the call), and from values (inside the op, on a CPU).

On a GPU the values are not looked at, since that would stop the stream: a target outside the vocabulary makes its row NaN and is told
later (`device_flags`), and so are a wrong count of scored rows and wrong offsets of the sequences.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from l3m_kernels import device_flags
from l3m_kernels.transforms import refuse_transforms, wants_gradient
from l3m_kernels.vocabulary_shards import is_dtensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


class Batch(NamedTuple):
    """A batch in the packed layout, T = N * L for a padded one."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,)
    bias: Tensor | None  # (V,)


def packed_batch(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    part: bool = False,
) -> Batch:
    """Check the arguments of `op`, apply autocast, and bring a padded batch (N, L, D) into the packed layout.

    `part`: `weight` and `bias` are a part of the vocabulary, which may be empty.
    """
    for name, tensor in (("hidden", hidden), ("targets", targets), ("cu_seqlens", cu_seqlens), ("bias", bias)):
        check_plain(op, name, tensor)
    refuse_transforms(op, hidden, weight, bias)
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        _check_constant(op, name, value)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    hidden, weight, bias = autocast(hidden, weight, bias)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight must be (V, D), the head's matrix, got shape {tuple(weight.shape)}")
    if weight.shape[0] < 1 and not part:
        raise ValueError(f"{op}: weight must have at least one row (V >= 1), got shape {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"{op}: weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}; cast one, or use autocast"
        )
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be (V,) = {tuple(weight.shape[:1])}, got shape {tuple(bias.shape)}")
        if bias.dtype != weight.dtype:
            raise ValueError(f"{op}: bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    if targets.dtype not in INTEGERS:
        raise ValueError(f"{op}: targets must be int64 token ids, got {targets.dtype}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"{op}: softcap must be a positive number or None, got {softcap}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: temperature must be a positive number, got {temperature}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on hidden's device {hidden.device}, got {tensor.device}")

    if cu_seqlens is None:
        if hidden.ndim != 3:
            raise ValueError(
                f"{op}: hidden must be padded (N, L, D), or packed (T, D) with cu_seqlens (N + 1,); "
                f"got shape {tuple(hidden.shape)} and no cu_seqlens"
            )
        sequences, length = hidden.shape[:2]
        cu_seqlens = torch.arange(sequences + 1, device=hidden.device) * length
    else:
        if hidden.ndim != 2:
            raise ValueError(f"{op}: with cu_seqlens, hidden must be packed (T, D), got shape {tuple(hidden.shape)}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in INTEGERS:
            raise ValueError(
                f"{op}: cu_seqlens must be (N + 1,) int32 or int64, got shape {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: targets must be {tuple(hidden.shape[:-1])} like hidden, got shape {tuple(targets.shape)}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: weight must be (V, D) with D = {hidden.shape[-1]} as in hidden, got shape {tuple(weight.shape)}"
        )
    return Batch(hidden.flatten(0, -2), weight, targets.reshape(-1).long(), cu_seqlens, bias)


def check_plain(op: str, name: str, tensor: Tensor | None) -> None:
    """ValueError where it is nested, or spread over ranks while the weight is not."""
    if tensor is None:
        return
    if is_dtensor(tensor):
        raise ValueError(f"{op}: {name} is a DTensor and weight is not; pass {name}.to_local()")
    if tensor.is_nested:
        raise ValueError(
            f"{op}: {name} must not be nested; pass .values() of a jagged one, and .offsets() as cu_seqlens"
        )


def _check_constant(op: str, name: str, value: float | Tensor | None) -> None:
    """A number; a tensor of no dimensions is taken for one, but not where a gradient would have to reach it."""
    if not isinstance(value, Tensor):
        return
    refuse_transforms(op, value)
    if value.ndim or wants_gradient(value):
        raise ValueError(
            f"{op}: {name} must be a number, a constant, got shape {tuple(value.shape)}, requires_grad={wants_gradient(value)}; "
            "pass a number, or learn it with l3m_kernels.reference, which is plain torch"
        )


def check_seq_weight(op: str, seq_weight: Tensor, batch: Batch) -> None:
    """(N,) constants, one for each sequence."""
    check_plain(op, "seq_weight", seq_weight)
    refuse_transforms(op, seq_weight)
    wanted = (batch.cu_seqlens.shape[0] - 1,)
    if seq_weight.shape != wanted or not seq_weight.is_floating_point():
        raise ValueError(
            f"{op}: seq_weight must be floating, {wanted}, got {tuple(seq_weight.shape)} {seq_weight.dtype}"
        )
    if seq_weight.device != batch.hidden.device:
        raise ValueError(f"{op}: seq_weight must be on hidden's device {batch.hidden.device}, got {seq_weight.device}")
    if wants_gradient(seq_weight):
        raise ValueError(
            f"{op}: seq_weight is a constant, got one that requires a gradient; detach it, or use log_likelihood"
        )


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `F.linear` does under autocast: 32- and 16-bit inputs in the autocast dtype, float64 as it is."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def check_values(
    op: str, targets: Tensor, cu_seqlens: Tensor, vocabulary: int, ignore_index: int, scored: int | None = None
) -> None:
    """Targets, their count and the order of cu_seqlens, for tensors on a CPU; on a GPU, what is known of earlier calls by now.

    Raises:
        IndexError: a target outside [0, V) that is not `ignore_index`, naming row and value (on a CPU).
        ValueError: cu_seqlens does not start at 0, end at T and never decrease; `scored` is not the number of targets other than
            `ignore_index` (on a GPU: is not in [0, T]).
    """
    total = len(targets)
    if targets.device.type == "cpu":  # whose offsets come to it
        cu_seqlens = cu_seqlens.cpu()
    if cu_seqlens.device.type == "cpu":
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((steps < 0).any()):
            raise ValueError(
                f"{op}: cu_seqlens must start at 0, never decrease and end at T = {total} (the rows of hidden); "
                f"got {shorten(cu_seqlens.tolist())}"
            )
    elif total and len(cu_seqlens) == 1:
        raise ValueError(
            f"{op}: cu_seqlens must start at 0 and end at T = {total} (the rows of hidden), got one offset"
        )
    if targets.device.type == "cuda":
        device_flags.raise_if_set(op, targets.device)
    if scored is not None and not 0 <= scored <= len(targets):
        raise ValueError(f"{op}: scored must be in [0, T = {len(targets)}], the number of rows, got {scored}")
    if targets.device.type == "cpu":
        if scored is not None and (count := int((targets != ignore_index).sum())) != scored:
            raise ValueError(
                f"{op}: scored must be {count}, the number of targets other than ignore_index ({ignore_index}), got {scored}"
            )
        outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        if bool(outside.any()):
            row = int(outside.nonzero()[0, 0])
            raise IndexError(
                f"{op}: targets[{row}] = {int(targets[row])} is outside the vocabulary [0, {vocabulary}) "
                f"and is not ignore_index ({ignore_index})"
            )


def offsets_on(device: torch.device, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
    """-> cu_seqlens on `device`, and () fp32 for results to have added where nobody has looked at them: 0, or NaN where they are wrong.

    From a CPU to a GPU through pinned memory, so that the host does not wait for what the device is busy with.

    Raises:
        ValueError: they would have to be copied into a CUDA graph, which would read the host's memory at each replay.
    """
    if device.type != "cuda":
        return cu_seqlens.to(device), None
    if cu_seqlens.device.type == "cpu":
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(f"cu_seqlens must be on {device} while a CUDA graph is captured, got cpu")
        return cu_seqlens.pin_memory().to(device, non_blocking=True), None
    with torch.cuda.device(device):
        return within(cu_seqlens.to(device), tokens)


def within(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Offsets that lead nowhere outside: cu_seqlens (N + 1,) itself if it starts at 0, ends at T, never falls; else a flag is up.

    -> (N + 1,) int64, and () fp32: 0, or NaN where these are not the ones that were given.
    """
    given = cu_seqlens.long()
    offsets = given.clamp(0, tokens).cummax(0).values
    offsets[:1].fill_(0)
    offsets[-1:].fill_(tokens)
    wrong = (offsets != given).any()
    device_flags.flag(given.device, "cu_seqlens").masked_fill_(wrong, 1)
    device_flags.copy_later(given.device)  # also where the backend sends none
    return offsets, torch.where(wrong, torch.nan, 0.0).float()


def shorten(values: list) -> str:
    """A list as text, its middle left out where it is long."""
    if len(values) <= 8:
        return str(values)
    head, tail = ", ".join(map(str, values[:4])), ", ".join(map(str, values[-3:]))
    return f"[{head}, ..., {tail}]"
