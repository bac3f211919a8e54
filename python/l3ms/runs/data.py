"""Task data: rows of text or messages -> token rows for the trainer.

A row is `{"prompt": str, "completion": str}` or `{"messages": [{"role", "content"}, ...]}`. Of a conversation the last
assistant turn is scored and everything before it is the prompt, because that is what a rollout can sample again. When
the tokenizer has a chat template, a text prompt becomes one user turn (`data.chat_template: false` keeps it plain).
Further columns that every row has are passed on to reward functions.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from l3ms.config.yaml_reader import ConfigError
from l3ms.model.columns import ROW, TAKEN
from l3ms.rollouts.prompts import Prompt, as_turns, encode_prompt

if TYPE_CHECKING:
    from l3ms.config.run_config import DataConfig

IGNORE_INDEX = -100
RESERVED = ROW | TAKEN


class Example(NamedTuple):
    prompt: Prompt
    completion: str
    columns: Mapping[str, Any] = MappingProxyType({})
    left_out: frozenset[str] = frozenset()  # columns whose names are taken


@dataclass
class Encoded:
    """Token rows `{"input_ids", "labels", "prompt", further columns}` and what happened to the ones that did not fit."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    truncated: int = 0  # completion cut at the maximum length
    dropped: int = 0  # prompt empty or too long, so nothing is left to score
    left_out: set[str] = field(default_factory=set)  # columns whose names are taken

    def notes(self, name: str) -> list[str]:
        lines = []
        if self.truncated:
            lines.append(f"{name}: {self.truncated} of {len(self.rows)} completions were cut at the maximum length")
        if self.dropped:
            total = len(self.rows) + self.dropped
            lines.append(f"{name}: {self.dropped} of {total} rows were dropped (prompt empty or too long)")
        if self.left_out:
            names = ", ".join(sorted(self.left_out))
            lines.append(f"{name}: left out, since reward functions are given something else by these names: {names}")
        return lines


def load_examples(config: DataConfig, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. Without a named evaluation set, a share of the *prompts* is held out, so that no
    prompt is on both sides. Raises `ConfigError` naming the field, the file and the line or row."""
    train = _read(config, "data.train", config.train, config.split)
    if config.evaluation is not None:
        return train, _read(config, "data.evaluation", config.evaluation, config.split)
    if config.evaluation_split is not None:
        if _is_jsonl(config.train):
            raise ConfigError("data.evaluation_split", "a JSONL file has no splits; use data.evaluation: FILE.jsonl")
        return train, _read(config, "data.evaluation_split", config.train, config.evaluation_split)
    return hold_out(train, config.evaluation_share, seed=seed)


def load_prompts(config: DataConfig, name: str, path: Path) -> list[Example]:
    """Rows of a JSONL file of which only the prompt is wanted: without a completion it is empty. `name` is blamed in a `ConfigError`."""
    examples = []
    for where, row in _jsonl_rows(name, path):
        if isinstance(row, dict) and config.messages not in row:
            row = {config.completion: "", **row}
        examples.append(_example(config, name, where, row))
    if not examples:
        raise ConfigError(name, f"{path} holds no rows")
    return examples


def hold_out(examples: list[Example], share: float, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Split by prompt: (training, held-out) with about `share` of the different prompts, at least one, held out."""
    keys = [json.dumps(example.prompt, sort_keys=True) for example in examples]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise ConfigError("data.train", f"needs at least 2 different prompts to hold some out, got {len(prompts)}")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, min(len(prompts) - 1, round(share * len(prompts))))])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for key, example in zip(keys, examples, strict=True):
        sides[key in held].append(example)
    return sides


def _is_jsonl(source: str) -> bool:
    return Path(source).suffix in {".jsonl", ".json"}


def _read(config: DataConfig, name: str, source: str, split: str) -> list[Example]:
    """All examples of one source; `name` is the field to blame."""
    rows = _jsonl_rows(name, Path(source)) if _is_jsonl(source) else _dataset_rows(config, name, source, split)
    examples = []
    for where, row in rows:
        examples.append(_example(config, name, where, row))
        if config.limit is not None and len(examples) == config.limit:
            break
    if not examples:
        raise ConfigError(name, f"{source} holds no rows")
    return examples


def _jsonl_rows(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(`FILE, line N`, parsed line) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    raise ConfigError(name, f"{where}: is not UTF-8 text") from None
                except json.JSONDecodeError as error:
                    raise ConfigError(name, f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
                except (RecursionError, ValueError):
                    raise ConfigError(name, f"{where}: is not JSON that can be read") from None
    except FileNotFoundError:
        raise ConfigError(name, f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(name, f"{path} cannot be read: {error.strerror}") from None


def _dataset_rows(config: DataConfig, name: str, source: str, split: str) -> Iterable[tuple[str, Any]]:
    """The rows of a `datasets` data set, local (folder, csv, parquet) or from the hub."""
    path = Path(source)
    if path.is_absolute() and not os.path.exists(path):  # false where pathlib raises: a name that is too long
        raise ConfigError(name, f"no such file or folder: {path}")
    import datasets

    try:
        if path.is_file():
            loaded = datasets.load_dataset(path.suffix.lstrip("."), data_files=str(path), split=split)
        else:
            loaded = datasets.load_dataset(source, config.name, split=split)
    except Exception as error:  # the library raises a dozen kinds, and its hub client more
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(name, f"`datasets` cannot load {source!r}, split {split!r}: {reason[0]}") from error
    return ((f"{source}, row {number}", row) for number, row in enumerate(loaded, 1))


def _example(config: DataConfig, name: str, where: str, row: Any) -> Example:
    """One checked row. The prompt of a conversation keeps its messages."""
    if not isinstance(row, dict):
        raise ConfigError(name, f"{where}: must be an object with fields, got {type(row).__name__}")
    known = RESERVED | {config.prompt, config.completion, config.messages}
    columns = {key: value for key, value in row.items() if key not in known and key.isidentifier()}
    left_out = frozenset(row) & TAKEN - {config.prompt, config.completion, config.messages}
    if config.messages in row:
        found = _conversation(config, name, where, row[config.messages])
        return found._replace(columns=columns, left_out=left_out)
    for column in (config.prompt, config.completion):
        if column not in row:
            fields = ", ".join(map(str, list(row)[:8])) or "none"
            raise ConfigError(name, f"{where}: field {column!r} is missing (fields: {fields})")
        _check_text(name, f"{where}: field {column!r}", row[column])
    return Example(row[config.prompt], row[config.completion], columns, left_out)


def _conversation(config: DataConfig, name: str, where: str, messages: Any) -> Example:
    """Messages up to the last assistant turn -> prompt, that turn -> completion; turns after it are left out."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(name, f"{where}: field {config.messages!r} must be a list of messages, got {messages!r:.60}")
    for index, message in enumerate(messages):
        spot = f"{where}: {config.messages}[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ConfigError(name, f"{spot} must hold role and content")
        _check_text(name, f"{spot}.role", message["role"])
        _check_text(name, f"{spot}.content", message["content"])
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 1:
        raise ConfigError(name, f"{where}: {config.messages} needs an assistant turn after the prompt")
    return Example(turns[:last], turns[last]["content"])


def _check_text(name: str, spot: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ConfigError(name, f"{spot} must be text, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(name, f"{spot} holds half a character (a lone surrogate)") from None


def encode(
    examples: list[Example],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt: int | None = None,
    chat_template: bool = True,
) -> Encoded:
    """Tokenise for the trainer: prompt masked with -100, end-of-sequence token appended to the completion.

    `max_length` counts prompt and completion; a prompt of more than `max_prompt` tokens (default `max_length - 1`)
    leaves no room for an answer, and its row is dropped.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("model", "the tokenizer has no end-of-sequence token, so responses could never end")
    template = bool(getattr(tokenizer, "chat_template", None))
    common = set.intersection(*(set(example.columns) for example in examples)) if examples else set()
    result = Encoded(left_out={name for example in examples for name in example.left_out})
    longest_prompt = min(max_length - 1, max_prompt if max_prompt is not None else max_length)
    for example in examples:
        prompt = example.prompt
        if not isinstance(prompt, str) and not template:
            hint = "use prompt/completion rows"
            raise ConfigError("data.train", f"rows hold messages, but the tokenizer has no chat template; {hint}")
        if chat_template:
            prompt = as_turns(tokenizer, prompt)
        head, tail = _tokens(tokenizer, prompt, example.completion)
        if not head or len(head) > longest_prompt:
            result.dropped += 1
            continue
        result.truncated += len(head) + len(tail) > max_length
        tail = tail[: max_length - len(head)]
        labels = [IGNORE_INDEX] * len(head) + tail
        columns = {name: example.columns[name] for name in sorted(common)}
        result.rows.append({**columns, "input_ids": head + tail, "labels": labels, "prompt": prompt})
    return result


def _tokens(tokenizer: Any, prompt: Prompt, completion: str) -> tuple[list[int], list[int]]:
    """(prompt tokens, completion tokens ending with the end-of-sequence token), split where a rollout would start."""
    end = tokenizer.eos_token_id
    head = encode_prompt(tokenizer, prompt)
    plain = [*tokenizer(completion, add_special_tokens=False)["input_ids"], end]
    if isinstance(prompt, str):
        return head, plain
    turn = {"role": "assistant", "content": completion}
    whole = list(tokenizer.apply_chat_template([*prompt, turn], return_dict=False))
    if whole[: len(head)] != head:  # a template that rewrites earlier turns
        return head, plain
    tail = whole[len(head) :]
    cut = len(tail) - tail[::-1].index(end) if end in tail else len(tail)
    return head, tail[:cut] if end in tail else [*tail, end]
