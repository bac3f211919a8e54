"""`evaluate:` and `logging:`, what is measured and written beside the training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from l3ms.config.sections import Batch, Count, Section, Text
from l3ms.config.trackers import named, wrong_trackers

Tag = Annotated[
    str, Field(pattern=r"^[^,\x00-\x1f]{1,64}$")
]  # W&B separates tags by commas, and takes no more than 64 characters
TABLES = {"completions": 8, "completions_every": 50}


class EvaluateConfig(Section):
    """Fresh samples on held-out prompts, after training (and before, with `initial`)."""

    samples: Annotated[int, Field(ge=2, le=1 << 24)] = 512
    batch_size: Batch = 64
    initial: bool = True


class LoggingConfig(Section):
    """Beside `metrics.jsonl`, which each run has."""

    tensorboard: bool = True  # event files in the run folder
    report_to: Text | list[Text] = "none"  # trackers, as transformers names them; "all": whatever is installed
    run_name: Text | None = None  # null: the name of the run folder
    project: Text | None = None  # an experiment of MLflow; null: what the tracker takes
    tags: list[Tag] = Field(default=[])
    completions: Annotated[int, Field(ge=0, le=1 << 12)] = TABLES["completions"]  # responses in a table; 0: no tables
    completions_every: Count = TABLES["completions_every"]  # iterations from one table to the next

    @property
    def trackers(self) -> list[str]:
        return named(self.report_to)

    def wrong(self, trackers: list[str]) -> str | None:
        """What of it these trackers cannot take, beginning with the field."""
        told = [field for field in ("run_name", "project", "tags") if getattr(self, field)]
        tables = any(getattr(self, field) != default for field, default in TABLES.items())
        return wrong_trackers(trackers, tensorboard=self.tensorboard, told=told, tables=tables)

    @model_validator(mode="after")
    def _check_trackers(self) -> LoggingConfig:
        if self.trackers != ["all"] and (wrong := self.wrong(self.trackers)):  # which "all" are, a run finds out
            raise ValueError(wrong)
        return self
