"""Task data: files or a data set -> rows (`reading`) -> examples (`examples`) -> token rows for the trainer (`encoding`).

A row is `{"prompt", "completion"}` (two texts, or two lists of messages), `{"messages": [{"role", "content", ...}, ...]}` or
`{"text"}`. Of a conversation the last assistant turn is scored and everything before it is the prompt, because that is what a rollout can
sample again. When the tokenizer has a chat template, a text prompt becomes one user turn (`data.chat_template: false` keeps it plain).
The template is given all that messages hold, and the column `tools`. Further columns that every row has are passed on to reward functions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l3ms.config.yaml_reader import ConfigError
from l3ms.rollouts.prompts import TEMPLATE_OPTIONS
from l3ms.runs.encoding import IGNORE_INDEX, RESERVED, Encoded, encode
from l3ms.runs.examples import Example, example
from l3ms.runs.reading import Rows, Source, is_files, is_glob, is_lines, is_table, json_rows, read_rows

if TYPE_CHECKING:
    from l3ms.config.run_config import DataConfig

__all__ = [
    "IGNORE_INDEX", "RESERVED", "Encoded", "Example", "encode", "hold_out", "load_examples", "load_prompts", "overlap"
]  # fmt: skip


def load_examples(config: DataConfig, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. Without a named evaluation set, a share of the *prompts* is held out, so that no
    prompt is on both sides. Raises `ConfigError` naming the field, the file and the line or row."""
    _check_splits(config)
    seen: set[str] = set()
    train = _read(config, "data.train", config.train, config.split, seen)
    if config.evaluation is not None:
        split = "train" if is_files(config.evaluation) else config.split
        sides = train, _read(config, "data.evaluation", config.evaluation, split, seen)
    elif config.evaluation_split is not None:
        sides = train, _read(config, "data.evaluation_split", config.train, config.evaluation_split, seen)
    else:
        sides = hold_out(train, config.evaluation_share, seed=seed)
    for field, column in config.named.items():
        if column not in seen:
            raise ConfigError(
                f"data.{field}", f"no row has a column {column!r} (columns: {', '.join(sorted(seen)[:8])})"
            )
    return sides


def load_prompts(config: DataConfig, name: str, path: Path) -> list[Example]:
    """Rows of a file of which only the prompt is wanted: without a completion it is empty. `name` is blamed in a `ConfigError`."""
    source = str(path)
    rows = _rows(config, name, source, "train") if is_table(source) else json_rows(name, source)
    examples = [example(config, name, where, row, prompt_only=True) for where, row in rows]
    if not examples:
        raise ConfigError(name, f"{path} holds no rows")
    return examples


def hold_out(examples: list[Example], share: float, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Split by prompt: (training, held-out) with about `share` of the different prompts, at least one, held out."""
    keys = [item.key for item in examples]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise ConfigError("data.train", f"needs at least 2 different prompts to hold some out, got {len(prompts)}")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, min(len(prompts) - 1, round(share * len(prompts))))])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for key, item in zip(keys, examples, strict=True):
        sides[key in held].append(item)
    return sides


def overlap(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    """What is said where prompts that are to be held out are trained on."""
    trained = {example.key for example in train}
    known = sum(example.key in trained for example in held_out)
    return [f"{known} of {len(held_out)} prompts are in the training data: not held out"] if known else []


def _check_splits(config: DataConfig) -> None:
    """Splits and configurations are of data sets; given for files that have none, they are refused."""
    sources: list[Source] = [config.train] if config.evaluation is None else [config.train, config.evaluation]
    if config.evaluation_split is not None and is_lines(config.train):
        raise ConfigError("data.evaluation_split", f"{_has_no(config.train)} splits; use data.evaluation: FILE.jsonl")
    if config.split != "train" and is_lines(config.train) and all(map(is_files, sources)):
        raise ConfigError(
            "data.split", f"{_has_no(config.train)} splits, got {config.split!r}; leave it out, or see data.limit"
        )
    if config.name is not None and all(map(is_files, sources)):
        raise ConfigError("data.name", f"names a configuration of a data set, and files have none, got {config.name!r}")


def _has_no(source: Source) -> str:
    return "a JSONL file has no" if isinstance(source, str) and not is_glob(source) else "a list of files has no"


def _rows(config: DataConfig, name: str, source: Source, split: str) -> Rows:
    texts = {config.prompt, config.completion, config.messages, config.text, config.tools, TEMPLATE_OPTIONS}
    return read_rows(name, source, configuration=config.name, split=split, texts=texts)


def _read(config: DataConfig, name: str, source: Source, split: str, seen: set[str]) -> list[Example]:
    """All examples of one source; `name` is the field to blame, `seen` gets the columns."""
    examples = []
    for where, row in _rows(config, name, source, split):
        examples.append(example(config, name, where, row))
        seen.update(map(str, row))
        if config.limit is not None and len(examples) == config.limit:
            break
    if not examples:
        raise ConfigError(name, f"{source if isinstance(source, str) else ', '.join(source)} holds no rows")
    return examples
