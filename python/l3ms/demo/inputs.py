"""What the demo leaves beside its models, so that the other commands know it as a run: its start, its data, its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from l3ms.demo.base import Base
from l3ms.demo.corpus import Pair
from l3ms.demo.settings import Settings
from l3ms.runs.folder import save_weights, write_config

HELD_OUT = 4096  # pairs that are kept for certificates, at most


def write_inputs(
    folder: Path, ready: Base, train: Iterable[Pair], low: float, high: float, seed: int, settings: Settings
) -> None:
    """`demo_inputs/` (base/, train.jsonl, held_out.jsonl) and `config.yaml`.

    `l3ms certify FOLDER` then works, and `l3ms train FOLDER/config.yaml --output OTHER` is much the same run (rows longer than
    `max_length` are cut there, and left out here).
    """
    inputs = folder / "demo_inputs"
    inputs.mkdir()
    save_weights(inputs, "base", ready.model, ready.tokenizer)
    _write(inputs / "train.jsonl", train)
    _write(inputs / "held_out.jsonl", ready.held_out_pairs[:HELD_OUT])
    write_config(folder, {
        "model": "demo_inputs/base",
        "output": ".",
        "data": {"train": "demo_inputs/train.jsonl", "evaluation": "demo_inputs/held_out.jsonl", "max_length": settings.max_length},
        "constraints": [{"type": "length", "name": "length", "min": low, "max": high}],
        "train": {
            "iterations": settings.iterations, "batch_size": settings.batch_size, "constraint_batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate, "warmup": settings.warmup, "max_new_tokens": settings.max_new_tokens,
        },
        "evaluate": {"samples": settings.samples, "batch_size": 128, "initial": False},
        "seed": seed,
    })  # fmt: skip


def _write(path: Path, pairs: Iterable[Pair]) -> None:
    lines = (json.dumps({"prompt": pair.prompt, "completion": pair.response}, ensure_ascii=False) for pair in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
