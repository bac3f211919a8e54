"""Run folders for the tests of verdicts: a tiny model that has not been trained, where a run would have left its weights."""

import json
import random
from pathlib import Path

import yaml

REWARDS = """
import math

def even(prompts, completions, completion_ids, **columns):
    return [float(len(ids) % 2 == 0) for ids in completion_ids]

def gaps(prompts, completions, **columns):
    return [None if i % 4 == 0 else 1.0 + i % 2 for i, _ in enumerate(completions)]

def holes(prompts, completions, **columns):
    return [math.nan if "b" in text else 1.0 + i % 2 for i, text in enumerate(completions)]

def late(prompts, completions, **columns):
    return [math.nan if i % 2 and len(completions) > 8 else 1.0 for i, _ in enumerate(completions)]

def same(prompts, completions, **columns):
    return [0.5] * len(completions)

def broken(prompts, completions, **columns):
    raise RuntimeError("no luck")
"""


def write_project(folder: Path, tokenizer, model, *, rows=300, **changes) -> Path:
    """`folder` with rows.jsonl, rewards.py, base/ and run.yaml; `changes` are top-level fields. -> run.yaml"""
    picks = random.Random(0)
    words = "abcdef"
    lines = [
        {"prompt": " ".join(picks.choices(words, k=6)), "completion": " ".join(picks.choices(words, k=4))}
        for _ in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    (folder / "rewards.py").write_text(REWARDS)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    values = {
        "model": "base", "output": "out",
        "data": {"train": "rows.jsonl", "evaluation_share": 0.5, "chat_template": False},
        "constraints": [{"type": "length", "min": 1.5, "max": 15.5}],
        "train": {"iterations": 3, "batch_size": 4, "constraint_batch_size": 8, "learning_rate": 1e-3, "max_new_tokens": 16,
                  "device": "cpu"},
        "evaluate": {"samples": 16, "batch_size": 64, "initial": False}, "logging": {"tensorboard": False},
        **changes,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_run(folder: Path, tokenizer, last, average, **changes) -> Path:
    """A run folder `folder/out` with the weights of two models. -> out"""
    from l3ms.config.run_config import load_config
    from l3ms.runs.folder import save_weights, write_config

    config = load_config(write_project(folder, tokenizer, last, **changes))
    out = Path(config.output)
    out.mkdir()
    write_config(out, config.model_dump())
    save_weights(out, "model", last, tokenizer)
    save_weights(out, "average", average, tokenizer)
    return out


def strict_json(path: Path):
    """As a parser reads it that knows neither NaN nor Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
