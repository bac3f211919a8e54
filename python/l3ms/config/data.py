"""The sections of a configuration that say where rows come from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from l3ms.config.sections import Section, Share, Text


class DataConfig(Section):
    """Task data: rows of `{"prompt", "completion"}` or `{"messages": [...]}`; its prompts are those of the rollouts."""

    train: Text  # a JSONL file, or a name that `datasets.load_dataset` knows
    evaluation: Text | None = None  # JSONL file with the held-out rows
    name: Text | None = None  # `datasets` configuration name
    split: Text = "train"  # `datasets` split
    evaluation_split: Text | None = None  # `datasets` split with the held-out rows
    evaluation_share: Share = 0.1  # held out from the training rows when nothing else is named
    prompt: Text = "prompt"  # column names
    completion: Text = "completion"
    messages: Text = "messages"
    chat_template: bool = True  # a text prompt becomes one user turn when the tokenizer has a chat template
    max_length: Annotated[int, Field(ge=2)] = 1024  # tokens of prompt + completion; longer rows are cut and counted
    limit: Annotated[int, Field(ge=2)] | None = None  # read at most this many rows
