"""Response tokens from the forward of a training, one whole forward for each token: for models whose `generate` has another distribution.

RoBERTa and its kin count positions from behind the padding's where none are given, and generate gives them; others keep no cache, or one
that sees less than the forward. Quadratic in the length, and always the policy that is scored, where later tokens are not seen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3ms.model.sharding import any_rank
from l3ms.rollouts.drawing import draw


def sample_by_forward(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad: int,
    end: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    in_step: bool = False,
) -> list[list[int]]:
    """As `shrinking.sample`, with no filter and no cache: rows leave the batch as they end."""
    rows = [list(prompt) for prompt in prompts]
    live, closing = list(range(len(rows))), set(end)
    for _ in range(max_new_tokens):
        if not live:
            last_logits(model, rows[:1], pad)  # another rank goes on, with this one's part of the weights
        else:
            live = _grown(model, rows, live, closing, pad, temperature)
        if not (any_rank(model, bool(live)) if in_step else live):
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _grown(
    model: Any, rows: list[list[int]], live: list[int], closing: set[int], pad: int, temperature: float
) -> list[int]:
    """The `live` rows have a token more; those of them that have not ended."""
    chosen = draw(last_logits(model, [rows[row] for row in live], pad) / temperature)
    for row, token in zip(live, chosen.tolist(), strict=True):
        rows[row].append(token)
    return [row for row in live if rows[row][-1] not in closing]


def last_logits(model: Any, rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """(N, V) of what follows each row."""
    ends = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    return scored_logits(model, rows, pad)[torch.arange(len(rows), device=model.device), ends]


def scored_logits(model: Any, rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """(N, L, V) as a training's forward has them: padded on the right, no cache."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[
        :, -width:
    ]  # a learned prefix is before them
