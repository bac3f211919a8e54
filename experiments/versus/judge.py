"""The one who says what a contestant's model is: fresh responses to held-out prompts, the same prompts for all, as `l3ms certify` does it.

A contestant that is tried with k settings is looked at k times, and each look may err: its verdicts hold at a level of 1 - delta / k each,
so that all of them together are wrong with a probability of delta at most, for everybody.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.versus.task import Task, encoded, examples, quiet
from l3ms.constraints.constraint import Length
from l3ms.measuring.evaluation import evaluate
from l3ms.runs.models import load_model
from l3ms.verdicts.certificates import judge
from l3ms.verdicts.certifying import draw, stream
from l3ms.verdicts.declaring import declare, known_range

FEW = 4  # tokens: a response that says nothing


def judged(
    task: Task, weights: Path, *, samples: int, delta: float, looks: int, batch_size: int = 32
) -> dict[str, Any]:
    """Of the model in `weights`: verdict and bounds of the mean length, and what the task costs.

    Args:
        samples: responses, one to each held-out prompt while there are some.
        delta: probability that any verdict of the contestant is wrong; `looks`: verdicts that it gets.
    """
    start = time.process_time()
    tokenizer, model = load_model(str(weights), dtype="float32", console=quiet())
    held_out = encoded(task, tokenizer, examples(task)[1]).rows
    rows, keys = draw(held_out, samples, stream("versus", task.seed, "prompts"))
    constraint = Length(task.min, task.max)
    known, indicator = known_range(constraint, task.max_new_tokens)
    each, groups = delta / looks / 2, len(set(keys))  # of two bounds
    declared = declare(constraint, groups, each, known=known, indicator=indicator, grouped=groups < len(keys))
    found = evaluate(
        model, tokenizer, rows, max_new_tokens=task.max_new_tokens, seed=stream("versus", task.seed, "responses"),
        batch_size=batch_size,
    )  # fmt: skip
    verdict = judge(constraint, [float(length) for length in found.lengths], each, declared, keys)
    return {
        "verdict": verdict.verdict,
        "length": found.summary["length"],
        "lower": verdict.lower,
        "upper": verdict.upper,
        "certificate": asdict(verdict),
        "level_of_each": 1 - each,
        "perplexity": found.summary["perplexity"],
        "few": sum(length < FEW for length in found.lengths) / len(rows),
        "cut": found.ended.count(False) / len(rows),
        "samples": len(rows),
        "prompts": groups,
        "sampled_tokens": sum(found.lengths),
        "examples": [_example(rows[i], found.completions[i]) for i in range(min(3, len(rows)))],
        "seconds": round(time.process_time() - start, 1),
    }


def _example(row: dict[str, Any], completion: Any) -> dict[str, str]:
    prompt, answer = row["prompt"], completion
    return {
        "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
        "response": answer if isinstance(answer, str) else answer[-1]["content"],
    }
