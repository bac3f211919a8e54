"""What the studies on a real model start from: SmolLM2-135M-Instruct and the docstring task, or a model and a task of one's own.

The model is that of `l3ms demo --model real` (`--model` names another), the task a one-line docstring for a signature. Of the mined
pairs those are kept that the model can write in full: a response that is cut would be one that has no end to learn.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from experiments import inputs
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo import real, real_model
from l3ms.demo.corpus import Pair

MOST_TOKENS = 40  # of a response, its end token included: `train.max_new_tokens` of these experiments


def prepare(output: Path, arguments: inputs.Arguments) -> dict[str, Any]:
    """Write `train.jsonl` and `held_out.jsonl` to `output`, unless they are there for the same arguments.

    Returns {"model", "train", "held_out"}. With `--data` the rows are those of that file, as they are, a tenth of them held out.
    """
    model = model_folder(arguments)
    if arguments.data is not None:
        return inputs.prepare(output, dataclasses.replace(arguments, model=model))
    key = {"model": model, "rows": arguments.rows, "seed": arguments.seed, "most": MOST_TOKENS}
    values = inputs.read_done(output, key)
    if values is None:
        output.mkdir(parents=True, exist_ok=True)
        values = {"model": model}
        tokenizer = AutoTokenizer.from_pretrained(model)
        for name, pairs in zip(("train", "held_out"), real.pairs(), strict=True):
            values[name] = str(output / f"{name}.jsonl")
            chosen = draw(pairs, arguments.rows, tokenizer, seed=arguments.seed)
            rows = ({"prompt": pair.prompt, "completion": pair.response} for pair in chosen)
            inputs.write_rows(output / f"{name}.jsonl", rows)
        inputs.write_done(output, key, values)
    return values


def model_folder(arguments: inputs.Arguments) -> str:
    """Of `--model`, or of the model that is made ready here: fetched, where that is allowed, and converted.

    Raises:
        ConfigError: it is not allowed, or it failed.
    """
    if arguments.model is None:
        try:
            return str(real_model.prepare(yes=arguments.yes))
        except (ModuleNotFoundError, OSError) as error:
            raise ConfigError("--model", f"SmolLM2 cannot be made ready: {error}; or name a folder of one") from error
    return str(Path(arguments.model).resolve()) if Path(arguments.model).is_dir() else arguments.model


def draw(pairs: Sequence[Pair], count: int, tokenizer: Any, *, seed: int) -> list[Pair]:
    """`count` of the pairs at random, those whose response has at most MOST_TOKENS tokens with its end.

    A hash of the prompt is what orders them: with a package more or less, nearly all that are drawn are the same.
    """
    order = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed} {pair.prompt}".encode()).digest())
    lengths = [
        len(ids) + 1 for ids in tokenizer([pair.response for pair in order], add_special_tokens=False)["input_ids"]
    ]
    return [pair for pair, length in zip(order, lengths, strict=True) if length <= MOST_TOKENS][:count]
