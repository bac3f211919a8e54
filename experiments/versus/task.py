"""What every contestant is given, and what it hands back.

A contestant is a file of this folder with

    train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained

It fine-tunes adapters on `task.model` with what `task` allows, writes to `folder` (empty) alone, and says what it has sampled on the way.
Whether the model that it leaves meets the bounds is not for it to say: `judge.py` samples that model anew, the same way for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from l3ms.config.data import DataConfig
from l3ms.rollouts.prompts import Message, Prompt
from l3ms.runs.data import Encoded, Example, encode, load_examples


@dataclass(frozen=True)
class Task:
    """Mean response length in [min, max] tokens, at the least loss on the completions."""

    model: str  # folder or hub id
    train: str  # JSONL with rows {"prompt", "completion"}
    held_out: str
    min: float = 12.0
    max: float = 16.0
    iterations: int = (
        40  # the unit of the budget: `batch_size` task rows, and `responses` sampled where a method samples
    )
    batch_size: int = 4
    responses: int = 8
    max_new_tokens: int = 40
    learning_rate: float = 3e-4
    lora_r: int = 8  # on all linear layers
    lora_alpha: int = 16
    max_length: int = 160  # tokens of prompt and completion
    seed: int = 0
    start: str | None = None  # adapters to go on from: what another contestant has left

    @property
    def unit(self) -> float:
        """Tokens per 1.0 of a violation: the middle of the range."""
        return (self.min + self.max) / 2

    def with_setting(self, setting: Mapping[str, Any]) -> tuple[Task, dict[str, Any]]:
        """(the task as the setting changes it, the rest of it): all may tune `learning_rate`, and take `times` as many iterations."""
        rest = dict(setting)
        rate, times = rest.pop("learning_rate", self.learning_rate), rest.pop("times", 1)
        return replace(self, learning_rate=rate, iterations=round(times * self.iterations)), rest

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Trained(NamedTuple):
    weights: Path  # folder with adapters and tokenizer
    sampled_tokens: int  # response tokens drawn while training
    log: list[dict[str, Any]]  # an object per iteration: "iteration", "length" (the mean of its responses), ...


class Contestant(Protocol):
    def train(self, task: Task, setting: Mapping[str, Any], folder: Path) -> Trained: ...


@dataclass
class Tally:
    """Counts the responses that a training draws."""

    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    def add(self, lengths: list[int], **more: Any) -> None:
        self.tokens += sum(lengths)
        self.log.append({"iteration": len(self.log) + 1, "length": sum(lengths) / len(lengths), **more})


def examples(task: Task) -> tuple[list[Example], list[Example]]:
    """(training, held-out) prompts with their completions, as texts or messages."""
    config = DataConfig(train=task.train, evaluation=task.held_out, max_length=task.max_length)
    return load_examples(config, seed=task.seed)


def encoded(task: Task, tokenizer: Any, rows: Sequence[Example]) -> Encoded:
    """Rows of tokens, as `l3ms train` and `l3ms certify` make them."""
    return encode(list(rows), tokenizer, max_length=task.max_length)


def as_row(prompt: Prompt, completion: str | Message) -> dict[str, Any]:
    """Both texts, or both lists of messages."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    turn = {"role": "assistant", "content": completion} if isinstance(completion, str) else completion
    return {"prompt": prompt, "completion": [turn]}


def only(setting: Mapping[str, Any], *known: str) -> dict[str, Any]:
    """The setting; ValueError for one that the contestant does not have."""
    if unknown := sorted(set(setting) - set(known)):
        raise ValueError(f"setting: {', '.join(unknown)} is none of {', '.join(known) or 'nothing'}")
    return dict(setting)


def quiet() -> Console:
    """The log of a cell is a file."""
    return Console(width=140, force_terminal=False)
