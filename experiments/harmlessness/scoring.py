"""Scores of conversations by a reward model: rows of like lengths go through it together, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.harmlessness.pairs import Pair, conversation

PART = 8  # rows of like lengths that go through the model together; 32 of the HH data, padded to their longest, are 1.6 times the tokens


def score(model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int) -> Tensor:
    """The raw score of each conversation, (N,) float64 on the CPU."""
    return outputs(model, tokenizer, texts, max_length)[:, 0]


def scores(model: Any, tokenizer: Any, pairs: Sequence[Pair], max_length: int) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected reply of each pair, (N,) each."""
    chosen, rejected = score(model, tokenizer, texts_of(pairs, tokenizer), max_length=max_length).chunk(2)
    return chosen, rejected


def texts_of(pairs: Sequence[Pair], tokenizer: Any) -> list[str]:
    """All chosen conversations, then all rejected ones."""
    return [conversation(pair, getattr(pair, side), tokenizer) for side in ("chosen", "rejected") for pair in pairs]


@torch.no_grad()
def outputs(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """What the model's head gives for each conversation, (N, labels) float64 on the CPU; leaves the model in eval mode."""
    model.eval()
    return logits_of(model, encode(tokenizer, texts, max_length).to(model.device)).double().cpu()


def logits_of(model: Any, batch: Any) -> Tensor:
    """(N, labels) of rows that are padded on the right: through the model in parts of like lengths, each as wide as its longest."""
    lengths = batch["attention_mask"].sum(1)
    order = lengths.argsort()
    parts = []
    for rows in order.split(PART):
        width = int(lengths[rows[-1]])
        parts.append(model(**{name: values[rows, :width] for name, values in batch.items()}).logits)
    return torch.cat(parts)[order.argsort()]


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> Any:
    """Tokens and attention mask of all texts, (N, L) each, padded together."""
    return tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
        return_token_type_ids=False,
        add_special_tokens=not getattr(tokenizer, "chat_template", None),  # a template has written them
    )
