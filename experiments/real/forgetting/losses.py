"""The loss of a model on each row of a file: what `data_nll` takes the mean of."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from l3ms.constraints.data_nll import DataNLL
from l3ms.runs.data import Example, encode
from l3ms.runs.models import load_model

MAX_LENGTH = 192  # as in experiment.yaml; no row is longer


def row_losses(model: str, rows: Path, *, longest: int = MAX_LENGTH) -> list[float | None]:
    """Nats per token of each row {"prompt", "completion"}; None for one of more than `longest` tokens, or with nothing to score."""
    tokenizer, network = load_model(model, dtype="float32", console=Console(quiet=True))
    found: list[float | None] = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}] if tokenizer.chat_template else row["prompt"]
        encoded = encode([Example(turns, row["completion"])], tokenizer, max_length=longest)
        whole = len(encoded.rows) == 1 and not encoded.truncated
        found.append(DataNLL("row", encoded.rows, monitor=True).evaluate(network)[0] if whole else None)
    return found
