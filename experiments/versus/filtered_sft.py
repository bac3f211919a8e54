"""Fine-tuning on the rows whose completions are as long as responses are to be: the data are filtered, nothing is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.inputs import write_rows
from experiments.versus.task import Task, Trained, as_row, encoded, examples, only
from experiments.versus.yaml_run import run
from l3ms.model.pretrained import load_tokenizer


def train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained:
    """setting: `keep: within`, the rows with completions in [min, max], or `target: TOKENS`, all but the longest (or the shortest) rows, so
    that the mean is that."""
    from transformers import AutoTokenizer

    own = only(setting, "keep", "target")
    tokenizer = load_tokenizer(AutoTokenizer, task.model)
    rows = [example for example in examples(task)[0] if encoded(task, tokenizer, [example]).rows]
    lengths = [scored(encoded(task, tokenizer, [example]).rows[0]) for example in rows]
    chosen = within(lengths, task.min, task.max) if "keep" in own else with_mean(lengths, float(own["target"]))
    if len(chosen) < task.batch_size:
        raise ValueError(f"{len(chosen)} of {len(rows)} rows are left, fewer than a batch of {task.batch_size}")
    path = folder / "filtered.jsonl"
    write_rows(path, (as_row(rows[i].prompt, rows[i].completion) for i in chosen))
    mean = sum(lengths[i] for i in chosen) / len(chosen)
    trained = run(replace(task, train=str(path)), {"solver": "none"}, folder, weights="model")
    return trained._replace(log=[{"rows": len(chosen), "of": len(rows), "mean_length": mean}])


def scored(row: Mapping[str, Any]) -> int:
    """Tokens of its completion, the closing one included."""
    return sum(label != -100 for label in row["labels"])


def within(lengths: Sequence[int], low: float, high: float) -> list[int]:
    return [i for i, length in enumerate(lengths) if low <= length <= high]


def with_mean(lengths: Sequence[int], target: float) -> list[int]:
    """The rows left when the longest (or, where the mean is below the target, the shortest) are taken away until the mean is met."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    total = sum(lengths)
    longest_first = total > target * len(lengths)
    while order and (total > target * len(order) if longest_first else total < target * len(order)):
        total -= lengths[order.pop() if longest_first else order.pop(0)]
    return sorted(order)
