"""Two things of the real model: docstrings, which it is to learn, and its own answers to instructions, which it is to go on giving.

What a chat model forgets is its own way to answer. Its loss on answers that people have written falls with any fine-tuning on what people
have written, docstrings too, so that loss only looks on. Bounded is the loss on what the model itself has answered before the training, at
a temperature of 1: above the start's, that is the divergence of what it says from what it said.

The instructions are the seed tasks of Alpaca (or rows of that form); half of them are held out, with their answers.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from experiments import inputs
from experiments.data_files import data_file, fingerprint, json_lines
from experiments.real import task
from l3ms.config.yaml_reader import ConfigError
from l3ms.rollouts.sampling import rollout
from l3ms.runs.models import load_model

MOST_TOKENS = 96  # of an instruction, and of an answer to it
# Answers to each: many to learn from, since 51 rows were learnt by heart (results/by-heart: 2.6 nats less, 1.3 more on held-out ones); of
# those that are held out the first that ends, since a certificate counts rows as independent
TRIES, TRIES_HELD_OUT = 16, 3
WHERE_FROM = (
    'JSONL of {"instruction", "instances": [{"input", "output"}]}, for instance seed_tasks.jsonl of the public repository '
    "tatsu-lab/stanford_alpaca; name it by --data or L3M_ALPACA_DATA"
)


def prepare(output: Path, arguments: inputs.Arguments) -> dict[str, Any]:
    """{"model", "train", "held_out"} of the docstrings, {"own", "own_held_out"} of the model's answers, and {"instructions",
    "instructions_held_out"} of people's to the same instructions.

    Raises:
        ConfigError: no instructions, or rows of another form.
    """
    data = data_file(arguments.data, "L3M_ALPACA_DATA", WHERE_FROM)
    rows = read_tasks(data)
    docstrings = dataclasses.replace(arguments, data=None)
    values = task.prepare(output / "docstrings", docstrings)
    key = {"model": values["model"], "data": fingerprint(data), "rows": arguments.rows, "seed": arguments.seed}
    done = inputs.read_done(output, key)
    if done is not None:
        return done
    tokenizer = AutoTokenizer.from_pretrained(values["model"])
    asked = short(rows, tokenizer)
    random.Random(arguments.seed).shuffle(asked)
    if len(asked) < 4:
        raise ConfigError("data", f"has {len(asked)} instructions that are short enough; at least 4 are wanted")
    Console().print(f"The model's own answers to {len(asked)} instructions")
    half = len(asked) // 2
    for suffix, side, tries in (("", asked[:half], TRIES), ("_held_out", asked[half:], TRIES_HELD_OUT)):
        answers = own_answers(values["model"], [row["prompt"] for row in side], tries, seed=arguments.seed)
        kept = [row for rows in answers for row in (rows[:1] if suffix else rows)]
        for name, part in (("own", kept), ("instructions", side)):
            values[name + suffix] = str(output / f"{name}{suffix}.jsonl")
            inputs.write_rows(output / f"{name}{suffix}.jsonl", part)
    inputs.write_done(output, key, values)
    return values


def read_tasks(path: Path) -> list[dict[str, str]]:
    """{"prompt", "completion"} of the first instance of each task. ConfigError naming the line for another form."""
    rows = []
    for number, line in enumerate(json_lines(path), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            instance = item["instances"][0]
            prompt = f"{item['instruction']}\n\n{instance['input']}".strip()
            rows.append({"prompt": prompt, "completion": instance["output"].strip()})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ConfigError("data", f"{path}, line {number}: wanted {WHERE_FROM}") from None
    return rows


def short(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[dict[str, str]]:
    """Those of at most `MOST_TOKENS` in the prompt and in the completion, which holds something; each prompt once."""

    def fits(text: str) -> bool:
        return 0 < len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= MOST_TOKENS

    unlike = {row["prompt"]: row for row in reversed(rows) if fits(row["prompt"]) and fits(row["completion"])}
    return list(reversed(unlike.values()))


def own_answers(model: str, prompts: Sequence[str], tries: int, *, seed: int) -> list[list[dict[str, str]]]:
    """{"prompt", "completion"} by prompt, of `tries` answers those that end and hold something."""
    tokenizer, network = load_model(model, dtype="float32", console=Console(quiet=True))
    found: list[list[dict[str, str]]] = [[] for _ in prompts]
    for number in range(tries):
        answers = rollout(
            network, tokenizer, prompts, max_new_tokens=MOST_TOKENS, batch_size=32, seed=tries * seed + number
        )
        for rows, prompt, completion, ended in zip(
            found, prompts, answers.completions, answers.ended.tolist(), strict=True
        ):
            text = (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
            if ended and text:
                rows.append({"prompt": prompt, "completion": text})
    return found
