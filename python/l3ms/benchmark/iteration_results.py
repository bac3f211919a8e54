"""What `l3ms bench --op iteration` writes and shows: every round of every contestant, by phase."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Literal

SHOWN = ("sampling", "constraint", "task", "optimizer", "rewards", "other")


@dataclass(kw_only=True)
class IterationMeasurement:
    contestant: str
    title: str
    kind: Literal["ours", "peer"]
    reason: str | None = None  # why it did not run
    phases: list[dict[str, float]] = field(default_factory=list)  # seconds of each round
    tokens: list[int] = field(default_factory=list)  # sampled in each round
    memory: int | None = None  # bytes at the peak of a round, beyond what was there before it
    error: float | None = None  # |gradient - ours| / |ours|, the larger of task and constraint

    @property
    def seconds(self) -> float | None:
        """The median of the rounds."""
        return statistics.median(sum(round.values()) for round in self.phases) if self.phases else None

    @property
    def rate(self) -> float | None:
        """Sampled tokens per second."""
        spent = [round["sampling"] for round in self.phases]
        return statistics.median(n / s for n, s in zip(self.tokens, spent, strict=True)) if spent else None

    def phase(self, name: str) -> float:
        return statistics.median(round[name] for round in self.phases)


@dataclass(kw_only=True)
class IterationResult:
    """One iteration of constrained fine-tuning: a step on the task, and a step on sampled responses."""

    model: str
    parameters: int
    lora: int | None  # rank
    dtype: str
    device: str
    task_rows: int
    responses: int
    max_new_tokens: int
    measurements: list[IterationMeasurement]

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What is measured."""
        return self.model, self.device, self.task_rows, self.responses, self.max_new_tokens

    @property
    def ours(self) -> IterationMeasurement:
        return next(item for item in self.measurements if item.kind == "ours")

    def ratio(self, item: IterationMeasurement) -> float | None:
        ours, theirs = self.ours.seconds, item.seconds
        return theirs / ours if ours and theirs else None

    @property
    def title(self) -> str:
        trains = f"LoRA, r = {self.lora}" if self.lora else "all weights"
        return (
            f"An iteration, {self.model} ({self.parameters / 1e6:.3g}M parameters, {trains}, {self.dtype}): {self.task_rows} task rows, "
            f"{self.responses} responses of at most {self.max_new_tokens} tokens"
        )
