"""A cache with room holds what one without holds, until it is full and beyond."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from l3ms.rollouts.roomy_cache import RoomyLayer, make_room


def states(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 2, length, 8, generator=generator), torch.randn(4, 2, length, 8, generator=generator)


def test_what_it_holds_is_what_was_put_in():
    plain, roomy = DynamicLayer(), RoomyLayer(*states(5, 0), room=4)
    plain.update(*states(5, 0))
    live = torch.tensor([0, 2, 3])
    for step, length in enumerate((1, 1, 2, 1, 1), 1):  # the fourth finds no room
        new = states(length, step)
        if step > 2:
            new = tuple(part[live] for part in new)
        for kept, wanted in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(kept, wanted)
        assert roomy.get_seq_length() == plain.get_seq_length()
        if step == 2:
            for layer in (plain, roomy):
                layer.batch_select_indices(live)


def test_tokens_are_written_in_place_while_there_is_room():
    cache = DynamicCache()
    cache.update(*states(5, 0), 0)
    make_room(cache, 2)
    layer: Any = cache.layers[0]
    first = layer.keys.data_ptr()
    for step in (1, 2):
        cache.update(*states(1, step), 0)
        assert layer.keys.data_ptr() == first
    cache.update(*states(1, 3), 0)
    assert layer.keys.data_ptr() != first
