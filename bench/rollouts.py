"""Time of sampling with and without letting ended rows leave the batch: `python bench/rollouts.py MODEL PROMPTS.jsonl`.

Takes turns, on the same prompts and seeds; prints the median time of each, their ratio, and the mean lengths, which must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from l3ms.rollouts.prompts import encode_prompt
from l3ms.rollouts.shrinking import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("prompts", type=Path, help='JSONL with "prompt"')
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(given.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    prompts = [json.loads(line)["prompt"] for line in given.prompts.read_text(encoding="utf-8").splitlines()]
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts[: given.batch_size * given.rounds]]
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=given.max_new_tokens, eos_token_id=end, pad_token_id=pad
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    lengths: dict[bool, list[int]] = {False: [], True: []}
    with torch.no_grad():
        for start in range(0, len(rows), given.batch_size):
            for shrink in (False, True):
                torch.manual_seed(start)
                began = time.perf_counter()
                responses = sample(model, rows[start : start + given.batch_size], pad, [end], config, shrink=shrink)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[shrink].append(time.perf_counter() - began)
                lengths[shrink] += map(len, responses)
    times = {shrink: statistics.median(values) for shrink, values in seconds.items()}
    for shrink, words in ((False, "all rows to the end"), (True, "ended rows leave")):
        mean = statistics.fmean(lengths[shrink])
        error = statistics.stdev(lengths[shrink]) / len(lengths[shrink]) ** 0.5
        print(f"{words:20} {1e3 * times[shrink]:8.0f} ms   mean length {mean:.2f} ± {error:.2f}")
    print(f"{times[True] / times[False]:.2f} of the time")


if __name__ == "__main__":
    main()
