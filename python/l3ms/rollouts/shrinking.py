"""Response tokens from `transformers.generate`, in a batch that shrinks as responses end.

`generate` computes every row until the last one has ended, and a few long responses are most of that time. Here it is stopped once a
third of the rows have ended and goes on with the others and their part of the cache: 32 responses of 64 tokens at most take 0.64 times as
long on one core where their mean is 22, 0.79 times where it is 35 (`bench/rollouts.py`; a half or a quarter instead of a third: 0.70 and
0.68, 0.79 and 0.78).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from l3ms.rollouts.roomy_cache import RoomyLayer, make_room
from l3ms.rollouts.shared_prefix import begun, pays

FEWEST = 4  # rows that are worth a smaller batch
SHARE = 3  # one row in so many has ended


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad: int,
    end: Sequence[int],
    config: GenerationConfig,
    *,
    drawn: LogitsProcessor | None = None,
    shrink: bool = True,
    room: bool = True,
    together: bool = False,
    in_step: bool = False,
) -> list[list[int]]:
    """Response tokens of one batch, each up to and including its end token.

    Args:
        model: a transformers causal LM in eval mode.
        prompts: tokens of each; padded on the left with `pad`, as generate wants them.
        end: tokens that close a response.
        config: of generate, with `max_new_tokens`.
        drawn: draws the tokens, where generate itself does not.
        room: give the cache room for the tokens to come, at the price of one more call of generate.
        together: what all prompts begin with goes through the model once (`shared_prefix`), where that pays and the batch may shrink.
        shrink: let ended rows leave, where the model's cache can (a `DynamicCache` of plain attention) and no other rank waits.
        in_step: other ranks hold parts of the model: the batch stays whole, and goes on until that of each of them has ended.
    """
    shrink = shrink and not in_step and _may_shrink(model)
    cache: Any = None
    if together and shrink and pays(prompts):
        cache, ids, mask = begun(model, prompts, pad)
    else:
        ids, mask = left_padded(prompts, pad, model.device)
    width = ids.shape[1]
    most = config.max_new_tokens
    closing = torch.tensor(list(end), device=ids.device)
    responses: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    while rows:
        started = ids.shape[1]
        first = room and shrink and started == width  # one token, whose cache is then given room for the others
        enough = _ManyEnded(started, closing) if shrink and len(rows) >= FEWEST else None
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_with(
                config, max_new_tokens=1 if first else width + most - started, return_dict_in_generate=True
            ),
            synced_gpus=in_step,
            **({} if drawn is None else {"logits_processor": LogitsProcessorList([drawn])}),
            **({} if cache is None else {"past_key_values": cache}),
            **({} if enough is None else {"stopping_criteria": StoppingCriteriaList([enough])}),
        )
        ids, cache = output.sequences, getattr(output, "past_key_values", None)
        ended = torch.isin(ids[:, started:], closing).any(1)
        live = (~ended).nonzero()[:, 0]
        done = range(len(rows)) if ids.shape[1] == width + most else ended.nonzero()[:, 0].tolist()
        for row, tokens in zip(done, ids[list(done), width:].tolist(), strict=True):
            responses[rows[row]] = _closed(tokens, set(end))
        if len(done) == len(rows):
            break
        if selects(cache):
            if len(done):
                cache.batch_select_indices(live)
            if first:
                make_room(cache, width + most - ids.shape[1])
        else:  # the others go on to their end, from where they are, with a cache of their own
            cache, shrink = None, False
        ids = ids[live]
        mask = torch.cat([mask[live], mask.new_ones(len(live), ids.shape[1] - started)], dim=1)
        rows = [rows[row] for row in live.tolist()]
    return responses


class _ManyEnded(StoppingCriteria):
    """Stops every row once a third of them have an end token at or after position `start`. Nothing is read back from the device."""

    def __init__(self, start: int, closing: Tensor):
        self.start, self.closing = start, closing

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        ended = torch.isin(input_ids[:, self.start :], self.closing).any(1)
        return (SHARE * ended.sum() >= len(ended)).expand(len(ended))


def _may_shrink(model: Any) -> bool:
    """A learned prefix is put before every call's tokens."""
    return not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def selects(cache: Any) -> bool:
    """Whether rows of it can be taken: what each layer holds is keys and values of all positions, as many in all of them.

    Models without attention leave theirs empty, or keep a state of another kind.
    """
    if type(cache) is not DynamicCache or not cache.layers:
        return False
    layers: list[Any] = cache.layers
    if any(type(layer) not in (DynamicLayer, RoomyLayer) for layer in layers):
        return False
    lengths = {layer.get_seq_length() for layer in layers}
    return len(lengths) == 1 and lengths != {0}


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """(N, L) tokens and mask, as generate wants them."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.tensor(list(tokens))
        mask[row, width - len(tokens) :] = 1
    return ids.to(device), mask.to(device)


def _with(config: GenerationConfig, **changes: Any) -> GenerationConfig:
    changed = copy.deepcopy(config)
    changed.update(**changes)
    return changed


def _closed(tokens: list[int], end: set[int]) -> list[int]:
    """Up to the first end token."""
    stop = next((i for i, token in enumerate(tokens) if token in end), len(tokens) - 1)
    return tokens[: stop + 1]
