"""Sums over the ranks that share a half-step, and the errors of one of them, which are errors on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l3ms.ranks.group import OtherRankRefused


class RankSums:
    """Of the estimates that it is a part of."""

    process_group: Any
    _sums: Tensor

    def _check_ranks(self, call: str) -> None:
        """RuntimeError where each rank would keep estimates of its own, and none says so."""
        if self.process_group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"{call}: this optimizer was made before torch.distributed was initialised, and knows of no other ranks: make it afterwards"
            )

    @contextmanager
    def errors_on_all_ranks(self) -> Iterator[None]:
        """Around what comes before an observation: an error in it is one on the other ranks too, where they wait for this one's sums."""
        try:
            yield
        except Exception:
            if self.process_group is not None:
                failed = torch.zeros_like(self._sums)
                failed[-1, 2] = 1.0
                dist.all_reduce(failed, group=self.process_group)
            raise

    def _of_all_ranks(self, local: Tensor) -> Tensor:
        """Sums of a part over all ranks. Row R holds responses, their tokens, ranks that failed."""
        part = local.clone()
        if self.process_group is not None:
            dist.all_reduce(part, group=self.process_group)
            if part[-1, 2] > 0:  # on a GPU this waits
                raise OtherRankRefused(
                    "observe: another rank refused its values or could not compute them; its error says why"
                )
        return part

    @property
    def _world(self) -> int:
        """Data-parallel wrappers average gradients over the ranks; the weights already divide by the responses of all of them."""
        return dist.get_world_size(self.process_group) if self.process_group is not None else 1
