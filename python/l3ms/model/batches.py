"""Rows of tokens: {"input_ids", "labels" (not shifted, -100 where not scored), "prompt" (text or messages), further columns}."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3ms.model.columns import ROW, check_names


class Collator:
    """Rows of token lists -> right-padded input_ids, attention_mask and labels (-100), each (N, L)."""

    def __init__(self, pad_token_id: int):
        self.pad = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        filled = {"input_ids": self.pad, "attention_mask": 0, "labels": -100}
        return {
            name: torch.tensor(
                [_column(row, name) + [value] * (width - len(row["input_ids"])) for row in rows], dtype=torch.int64
            )
            for name, value in filled.items()
        }


class CountingCollator(Collator):
    """A `Collator` whose batches have "scored" as well, the number of their scored tokens: counted here, a GPU is not waited for."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        return {**batch, "scored": int((batch["labels"][:, 1:] != -100).sum())}


def _column(row: dict[str, Any], name: str) -> list[int]:
    return [1] * len(row["input_ids"]) if name == "attention_mask" else list(row[name])


def prompt_part(row: dict[str, Any]) -> list[int]:
    """The tokens before the first scored one."""
    scored = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
    return list(row["input_ids"][:scored])


def further_columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows' further columns, for reward functions. ValueError for a name that is taken."""
    names = set(rows[0]) - ROW
    check_names("rows", sorted(names, key=str))
    return {name: [row[name] for row in rows] for name in sorted(names)}
