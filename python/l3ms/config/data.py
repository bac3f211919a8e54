"""The sections of a configuration that say where rows come from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from l3ms.config.sections import MOST, Section, Share, Text

SHARE = 0.1
# Fields that name a column, by default of their own name
COLUMNS = ("prompt", "completion", "messages", "text", "tools")
Files = Annotated[list[Text], Field(min_length=1)]


class DataConfig(Section):
    """Task data: rows of `{"prompt", "completion"}` (texts, or both lists of messages), `{"messages": [...]}` or `{"text"}`, with `tools`
    where the chat template takes some; its prompts are those of the rollouts.

    A source is a file (.jsonl, .json: lines or one array, both also .gz; .csv, .tsv, .parquet), a glob, a list of these, or the name of a
    `datasets` data set.
    """

    train: Text | Files
    evaluation: Text | Files | None = None  # the held-out rows
    name: Text | None = None  # `datasets` configuration name
    split: Text = "train"  # `datasets` split of `train`, and of `evaluation` where that is the name of a data set
    evaluation_split: Text | None = None  # `datasets` split with the held-out rows
    evaluation_share: Share = SHARE  # held out from the training rows when nothing else is named
    # Columns. One that is named otherwise than here goes before those that have their names here, and some row must have it
    prompt: Text = "prompt"
    completion: Text = "completion"
    messages: Text = "messages"
    text: Text = "text"
    tools: Text = "tools"
    chat_template: bool = True  # a text prompt becomes one user turn when the tokenizer has a chat template
    max_length: Annotated[int, Field(ge=2, le=MOST)] = (
        1024  # tokens of prompt + completion; longer rows are cut and counted
    )
    limit: Annotated[int, Field(ge=2, le=MOST)] | None = None  # read at most this many rows

    @property
    def named(self) -> dict[str, str]:
        """Field -> its column, of those that are not the default."""
        return {field: getattr(self, field) for field in COLUMNS if getattr(self, field) != field}

    @model_validator(mode="after")
    def _check_held_out(self) -> DataConfig:
        if self.evaluation is not None and self.evaluation_split is not None:
            raise ValueError("evaluation_split names held-out rows, and so does evaluation: give one of them")
        given = "evaluation" if self.evaluation is not None else "evaluation_split"
        if getattr(self, given) is not None and self.evaluation_share != SHARE:
            raise ValueError(f"evaluation_share is of no use where {given} names the held-out rows: leave one out")
        return self
