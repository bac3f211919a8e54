"""Rows of tokens: {"input_ids", "labels" (not shifted, -100 where not scored), "prompt" (text or messages), further columns}."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from l3ms.model.columns import ROW, check_names


class Collator:
    """Rows of token lists -> right-padded input_ids, attention_mask and labels (-100), each (N, L)."""

    def __init__(self, pad_token_id: int):
        self.pad = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [_tokens(row) for row in rows]
        width = max(len(ids) for ids, _ in pairs)
        filled: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids, labels in pairs:
            rest = width - len(ids)
            filled["input_ids"].append(ids + [self.pad] * rest)
            filled["attention_mask"].append([1] * len(ids) + [0] * rest)
            filled["labels"].append(labels + [-100] * rest)
        return {name: torch.tensor(values, dtype=torch.int64) for name, values in filled.items()}


class CountingCollator(Collator):
    """A `Collator` whose batches have "scored" as well, the number of their scored tokens: counted here, a GPU is not waited for."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        return {**batch, "scored": int((batch["labels"][:, 1:] != -100).sum())}


OURS = {"input_ids", "attention_mask", "labels", "scored"}  # what such a batch holds

PACKED = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens")

OWN_COLLATOR = "a batch does not hold them; give a data_collator whose batches do"


def _tokens(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens and labels of a row, without what its attention_mask hides: padding that it came with.

    Raises `ValueError` for a row that has none, another number of labels than tokens, several sequences, or position_ids or
    token_type_ids that are not those that a model supposes.
    """
    if "input_ids" not in row or "labels" not in row:
        raise ValueError(f"rows must hold input_ids and labels, got {sorted(row)}: encode texts first")
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if len(ids) != len(labels):
        raise ValueError(f"a row must have one label per token, got {len(ids)} input_ids and {len(labels)} labels")
    positions, mask = row.get("position_ids"), row.get("attention_mask")
    if (
        any(name in row for name in (*PACKED[1:], "seq_lengths"))
        or (positions is not None and any(position == 0 for position in list(positions)[1:]))
        or (mask is not None and any(int(number) > 1 for number in mask))
    ):
        raise ValueError("a row must be one sequence, got a packed one: give its sequences as rows of their own")
    if mask is not None:
        ids, labels, positions = (_kept(values, mask) for values in (ids, labels, positions))
    if positions is not None and [int(position) for position in positions] != list(range(len(ids))):
        raise ValueError(f"position_ids of a row must count from 0: {OWN_COLLATOR}")
    if any(int(kind) for kind in row.get("token_type_ids", ())):
        raise ValueError(f"token_type_ids of a row must be 0: {OWN_COLLATOR}")
    return ids, labels


def _kept(values: Any, mask: Any) -> Any:
    return None if values is None else [value for value, keep in zip(values, mask, strict=True) if keep]


def separate(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as a collator of somebody else made it, with a row for each sequence where it packs several into one.

    Several are told by position_ids that begin anew (`DataCollatorWithFlattening`), seq_idx, cu_seq_lens_q, or an attention_mask that
    numbers them. The loss is a mean over sequences, so it must know them; computed as rows of their own none sees another.

    Raises:
        ValueError: no input_ids or labels, an attention_mask that is not (N, L), or further tensors in a packed batch.
    """
    if not batch.keys() >= {"input_ids", "labels"}:
        raise ValueError(f"a batch must hold input_ids and labels, which the task loss is of, got {sorted(batch)}")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be (N, L), got {tuple(mask.shape)}: give packed sequences by position_ids"
        )
    mask = torch.ones_like(ids) if mask is None else mask
    begins = torch.zeros_like(ids, dtype=torch.bool)
    if (positions := batch.get("position_ids")) is not None:
        begins |= (positions if positions.ndim == 2 else positions[0]).expand_as(ids) == 0
    for numbers in (mask if bool((mask > 1).any()) else None, batch.get("seq_idx")):
        if numbers is not None:
            begins |= torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))
    if (ends := batch.get("cu_seq_lens_q", batch.get("cu_seqlens"))) is not None:
        begins[0, ends.long()[:-1]] = True
    kept = mask != 0
    number = (begins & kept).cumsum(1)
    first = torch.where(kept, number, number.shape[1]).amin(1, keepdim=True)
    number = torch.where(kept, number - first, 0)
    if not bool((number > 0).any()):
        return dict(batch)
    further = sorted(set(batch) - {"input_ids", "labels", "attention_mask", "scored", *PACKED})
    if further:
        raise ValueError(
            f"a packed batch may hold input_ids, labels, attention_mask and {', '.join(PACKED)}, got {further}"
        )
    chosen = [(n, kept[n] & (number[n] == k)) for n in range(len(ids)) for k in range(int(number[n].max()) + 1)]
    parts = {"input_ids": (ids, 0), "labels": (batch["labels"], -100), "attention_mask": (torch.ones_like(ids), 0)}
    return {
        name: pad_sequence([values[n][where] for n, where in chosen], batch_first=True, padding_value=fill)
        for name, (values, fill) in parts.items()
    }


def prompt_part(row: Mapping[str, Any]) -> list[int]:
    """The tokens before the first scored one."""
    ids, labels = _tokens(row)
    return ids[: next((i for i, label in enumerate(labels) if label != -100), len(labels))]


def further_columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows' further columns, for reward functions. ValueError for a name that is taken, or a column that only some rows have."""
    names = set().union(*rows) - ROW
    check_names("rows", sorted(names, key=str))
    for row in rows:
        if missing := sorted(names - set(row)):
            raise ValueError(
                f"rows: reward functions are given {missing[0]!r} of all rows or of none, and the row of the prompt "
                f"{row.get('prompt')!r:.60} has none"
            )
    return {name: [row[name] for row in rows] for name in sorted(names)}
