"""`L3MConfig`: transformers' TrainingArguments, and what the constraints add."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from l3ms.training.settings import L3MSettings


@dataclass
class L3MConfig(L3MSettings, TrainingArguments):
    """TrainingArguments, and what the constraints add. `max_steps` counts iterations; `max_grad_norm` clips each half-step."""

    half_steps: str = field(
        default="alternating",
        metadata={
            "help": "alternating: task and constraints step in turn, each clipped; joint: one step on their sum, clipped"
        },
    )
    average_fraction: float = field(
        default=0.2, metadata={"help": "last share of the iterations whose weights are averaged"}
    )
    adam_beta1: float = field(
        default=0.5, metadata={"help": "momentum; 0.9 makes the constraints' pressure late: the mean swings"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows keep their prompt"})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "equal batches: their means are the mean"})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # accelerate otherwise takes each of several processes on CPUs for one that is alone, and says nothing
        TrainingArguments.__post_init__(self)
        if self.half_steps is None:
            raise ValueError("half_steps must be alternating or joint, got None")
        self.check()
