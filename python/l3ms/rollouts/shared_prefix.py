"""What all prompts of a batch begin with, through the model once, and its keys and values in every row's cache.

A chat template begins each prompt with the same system turn: 38 of 55 tokens of a short question to SmolLM2-135M-Instruct. On one core 32
responses of at most 64 tokens take 0.80 of the CPU time of whole prompts, 8 of 40 with adapters 0.91 (`bench/rollouts.py`).
Rows are [beginning, padding, rest], where others are [padding, prompt]: what is masked lies in the middle, and positions count as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 64  # tokens that need not go through the model: fewer are not worth another forward


def shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, and none of them ends with."""
    rows: Any = prompts
    ends = [list(of(rows)) for of in (min, max)]  # in lexical order, between which all others are
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if ends[0][i] != ends[1][i]), most)


def pays(prompts: Sequence[Sequence[int]]) -> bool:
    return (len(prompts) - 1) * shared(prompts) >= LEAST


def begun(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Any, Tensor, Tensor]:
    """-> the cache of the beginning in as many rows as there are prompts, and (N, L) tokens and mask of all, as generate wants them."""
    count, width, device = shared(prompts), max(map(len, prompts)), model.device
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    mask[:, :count] = 1
    for row, tokens in enumerate(prompts):
        ids[row, :count] = torch.tensor(list(tokens[:count]))
        ids[row, width - len(tokens) + count :] = torch.tensor(list(tokens[count:]))
        mask[row, width - len(tokens) + count :] = 1
    ids, mask = ids.to(device), mask.to(device)
    return cache_of(model, ids, mask, count), ids, mask


def cache_of(model: Any, ids: Tensor, mask: Tensor, count: int) -> Any:
    """The cache of the first `count` tokens, in which all rows (N, L) of `ids` are alike, once for each row."""
    output = model(input_ids=ids[:1, :count], attention_mask=mask[:1, :count], use_cache=True, logits_to_keep=1)
    output.past_key_values.batch_repeat_interleave(len(ids))
    return output.past_key_values
