"""A cache with room for the tokens to come.

A `DynamicLayer` copies all keys and values to append those of one token: for 32 rows of 50 to 114 tokens of SmolLM2-135M on one core that
is 36 of the 145 ms of a decode step, more with each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of a `DynamicLayer`, and of as many more tokens as it is told; of more than these it is a `DynamicLayer` again."""

    keys: Any  # never None here, as it may be in the layers that this is one of
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        """`keys` and `values` (N, heads, length, width); `room`: tokens to come."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._spread(keys, values, room)

    def _spread(self, keys: Tensor, values: Tensor, room: int) -> None:
        self._all = [
            torch.cat([part, part.new_empty(*part.shape[:-2], room, part.shape[-1])], dim=-2) for part in (keys, values)
        ]
        self._show(keys.shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (part[..., :length, :] for part in self._all)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2]
        length = start + key_states.shape[-2]
        if length > self._all[0].shape[-2]:
            return super().update(key_states, value_states, *args, **kwargs)
        for part, states in zip(self._all, (key_states, value_states), strict=True):
            part[..., start:length, :] = states
        self._show(length)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        room = max(0, self._all[0].shape[-2] - self.keys.shape[-2])
        self._spread(self.keys[indices], self.values[indices], room)


def make_room(cache: DynamicCache, tokens: int) -> None:
    """Of a cache whose layers are plain (`selects`)."""
    layers: list[Any] = cache.layers
    layers[:] = [RoomyLayer(layer.keys, layer.values, tokens) for layer in layers]
