"""Which rows of a batch the GPU backends work on, in which order, and how many: counted, or given, or all of them.

Scored rows come first, those with a gradient before those without, each in the order of the batch; unscored ones are dropped.

* Counted: the host waits for the device, once, and each row costs what it needs.
* Given: nothing waits. The sort is the same; the host knows where the scored rows end, and takes all of them as rows with a gradient, of 0
  where there is none. The device compares the count with its own: where it differs, a flag goes up and every result of the call is NaN.
* While a CUDA graph is captured nothing may wait. Without a given count all rows are computed then, unscored ones with a gradient of 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from l3m_kernels import device_flags


class Rows(NamedTuple):
    index: Tensor  # (n,) int64: first the rows with a gradient, then those without
    gradient: int
    scored: int
    compact: bool  # unscored rows are not among them
    idle: bool = False  # rows whose gradient is 0 may be among those with one
    fault: Tensor | None = None  # () fp32, where the count was given: 0, or NaN where it is wrong
    all_with_gradient: bool = False  # surely every row of the batch, in its order; False: perhaps


def ordered(scored: Tensor, gradient: Tensor | None, count: int | None = None) -> Rows:
    """Rows in the order of the work.

    Args:
        scored: (T,) bool.
        gradient: (T,) bool, rows that have one; None: none has.
        count: how many are scored, at most T, where the caller knows.
    """
    if count is None and scored.is_cuda and torch.cuda.is_current_stream_capturing():
        rows = len(scored)
        index, with_gradient = torch.arange(rows, device=scored.device), 0 if gradient is None else rows
        return Rows(index, with_gradient, rows, False, idle=True, all_with_gradient=gradient is not None)
    if count is not None and count == len(scored):  # all, as they stand; one that is not scored makes all NaN
        every, with_gradient = torch.arange(count, device=scored.device), 0 if gradient is None else count
        return Rows(every, with_gradient, count, True, True, _fault(scored, count), gradient is not None)
    key = torch.where(scored, 1, 2)
    if gradient is not None:
        key -= (scored & gradient).long()
    index = key.byte().sort(stable=True).indices
    if count is None:
        with_gradient, kept = torch.stack([(key == 0).sum(), (key < 2).sum()]).tolist()  # here the host waits
        return Rows(index[:kept], with_gradient, kept, True, all_with_gradient=with_gradient == len(scored))
    return Rows(index[:count], 0 if gradient is None else count, count, True, idle=True, fault=_fault(scored, count))


def _fault(scored: Tensor, count: int) -> Tensor:
    """() fp32, 0 or NaN, and a flag."""
    wrong = scored.sum() != count
    device_flags.flag(scored.device, "scored").masked_fill_(wrong, 1)
    return torch.where(wrong, torch.nan, 0.0).float()
