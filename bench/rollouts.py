"""Tokens per second of sampling: `python bench/rollouts.py MODEL PROMPTS.jsonl`, one more argument `--lora 8` for adapters.

Four ways take turns on the same prompts and seeds: plain `generate`; a batch that ended rows leave (`rollouts.shrinking`); what a
training does, which on a CPU also multiplies by packed weights, keeps room in its cache and draws one number a row; and that without what
it saves where prompts begin alike (`rollouts.shared_prefix`). Prints a row of a table for each: median seconds, tokens per second, and the
mean lengths, which must agree. bench/results/rollouts.md keeps some.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from l3ms.rollouts import shrinking
from l3ms.rollouts.engines import Response
from l3ms.rollouts.prompts import as_turns, encode_prompt
from l3ms.rollouts.shrinking import sample
from l3ms.rollouts.transformers_engine import TransformersEngine

Rows = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("prompts", type=Path, help='JSONL with "prompt"')
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters on all linear layers")
    given = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(given.model)
    if given.lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=given.lora, target_modules="all-linear"))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    with given.prompts.open(encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    rows = [encode_prompt(tokenizer, as_turns(tokenizer, p)) for p in prompts[: given.batch_size * given.rounds]]
    found = race(ways(model, tokenizer, given.max_new_tokens), rows, given.batch_size)
    setting = f"{given.batch_size} x {given.max_new_tokens}" + (f", LoRA r = {given.lora}" * bool(given.lora))
    print("| responses x tokens | way | seconds | tokens per second | mean length |\n|---|---|---:|---:|---:|")
    for name, measured in found.items():
        seconds, lengths = zip(*measured, strict=True)
        each = [length for batch in lengths for length in batch]
        error = statistics.stdev(each) / math.sqrt(len(each))
        print(
            f"| {setting} | {name} | {statistics.median(seconds):.2f} | {sum(each) / sum(seconds):.0f} | "
            f"{statistics.fmean(each):.1f} ± {error:.1f} |"
        )


def ways(model: Any, tokenizer: Any, most: int) -> dict[str, Callable[[Rows], Rows]]:
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=most, eos_token_id=end, pad_token_id=pad)
    engine, generator = TransformersEngine(model, tokenizer), torch.default_generator
    options: dict[str, Any] = {"max_new_tokens": most, "temperature": 1.0, "end": [end], "generator": generator}
    return {
        "generate": lambda rows: sample(model, rows, pad, [end], config, shrink=False),
        "ended rows leave": lambda rows: sample(model, rows, pad, [end], config, room=False),
        "as in training": lambda rows: [response.tokens for response in engine.sample(rows, **options)],
        "as in training, whole prompts": lambda rows: [r.tokens for r in _whole(engine, rows, options)],
    }


def _whole(engine: TransformersEngine, rows: Rows, options: dict[str, Any]) -> list[Response]:
    with mock.patch.object(shrinking, "pays", return_value=False):
        return engine.sample(rows, **options)


@torch.no_grad()
def race(
    contestants: dict[str, Callable[[Rows], Rows]], rows: Rows, size: int
) -> dict[str, list[tuple[float, list[int]]]]:
    """(seconds, lengths) of each batch, by way."""
    found: dict[str, list[tuple[float, list[int]]]] = {name: [] for name in contestants}
    for way in contestants.values():
        way(rows[:2])  # the first sampling of a model tries what it needs
    for start in range(0, len(rows), size):
        for name, way in contestants.items():
            torch.manual_seed(start)
            began = time.perf_counter()
            responses = way(rows[start : start + size])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append((time.perf_counter() - began, [len(response) for response in responses]))
    return found


if __name__ == "__main__":
    main()
