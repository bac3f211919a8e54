"""Reward values as they come, a list or a tensor per constraint, as one table in float64; what cannot be one is named."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l3ms.constraints.constraint import Constraint
from l3ms.constraints.reward_values import numbers

Values = Mapping[str, Sequence[float | None] | Tensor]
Lengths = Tensor | Sequence[int] | None


def check_lengths(lengths: Tensor, count: int) -> None:
    """ValueError unless they are `count` numbers of tokens; those on a GPU, which is not waited for, need only be as many."""
    if lengths.shape != (count,):
        raise ValueError(f"observe: lengths must be ({count},), one per response, got {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and not bool((lengths >= 0).all()):  # NaN is not
        row = int((~(lengths >= 0)).nonzero()[0, 0])
        raise ValueError(f"observe: lengths[{row}] must be a number of tokens, got {lengths[row].item()}")


class RewardTables:
    """Of the estimates that it is a part of."""

    constraints: tuple[Constraint, ...]
    index: dict[str, int]  # name -> number of the constraint
    device: torch.device
    drop_nonfinite: bool
    dropped: Tensor  # (R,) int64, values that were not finite

    def _check_names(self, values: Mapping[str, Any]) -> None:
        unknown = sorted(set(values) - set(self.index))
        if unknown or not values:
            raise ValueError(
                f"observe: wanted values for constraints among {sorted(self.index)}, got {unknown or 'none'}"
            )

    def _table(self, values: Values) -> Tensor:
        """(n, R) float64, NaN where missing."""
        self._check_names(values)
        columns: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                columns[name] = self._finite(name, value.detach())
            else:
                listed = numbers(f"observe: {self.constraints[self.index[name]].where}", value)
                given = torch.tensor([math.nan if v is None else v for v in listed], dtype=torch.float64)
                absent = torch.tensor([v is None for v in listed], dtype=torch.bool)
                columns[name] = self._finite(name, given, absent)
            self._check_indicators(name, columns[name])
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"observe: every constraint needs one value per response, got {sizes}")
        missing = torch.full((next(iter(sizes.values())),), math.nan, dtype=torch.float64, device=self.device)
        return torch.stack([columns.get(constraint.name, missing) for constraint in self.constraints], dim=1)

    def _finite(self, name: str, column: Tensor, absent: Tensor | None = None) -> Tensor:
        """(n,) float64 on the estimates' device; a NaN or inf is an error, or dropped and counted where that was asked for."""
        if column.is_complex():
            raise ValueError(f"observe: values of constraint {name!r} must be real numbers, got {column.dtype}")
        if column.ndim != 1:
            raise ValueError(
                f"observe: values of constraint {name!r} must be (n,), one per response, got {tuple(column.shape)}"
            )
        bad = ~column.isfinite() if absent is None else ~column.isfinite() & ~absent
        if self.drop_nonfinite:
            self.dropped[self.index[name]] += bad.sum().to(self.device)
            column = column.double().masked_fill(bad, math.nan)
        elif bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"observe: {self.constraints[self.index[name]].where}: row {row} is {column[row].item()}; "
                'pass None to exclude a response, or use L3MOptimizer(nonfinite="drop")'
            )
        return column.to(self.device, torch.float64)

    def _check_indicators(self, name: str, column: Tensor) -> None:
        """ValueError where values of a share are no 0 and 1: raw ones would be taken for the share itself."""
        constraint = self.constraints[self.index[name]]
        if constraint.event is not None and bool((other := (column != 0) & (column != 1) & column.isfinite()).any()):
            row = int(other.nonzero()[0, 0])
            raise ValueError(
                f"observe: {constraint.where}: row {row} is {column[row].item():g}, and a share is of 0 and 1; give "
                "constraint.indicator(values), or what rollout.rewards returns"
            )
