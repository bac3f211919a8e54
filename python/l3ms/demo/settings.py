"""How long and how large the two runs of a demo are."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Of both runs. Lengths in tokens of the model's tokenizer. The defaults are those of the tiny model."""

    iterations: int = 150
    batch_size: int = 32  # task sequences
    responses: int | None = None  # for the constraints; default: as many
    learning_rate: float = 1e-3  # Adam(0.5, 0.95), 10 warm-up steps, then linear to a tenth
    lora: int | None = None  # rank of adapters on all linear layers; default: all weights are trained
    max_new_tokens: int = 100
    max_length: int = 128  # the rows that are longer (1%) are left out: a batch costs its longest row
    samples: int = 768  # held-out responses per model
    sampled_at_once: int = 128
    shown: int = 4  # of them, side by side

    @property
    def pairs(self) -> int:
        """That both runs learn from, and the constraint's prompts."""
        return self.iterations * self.batch_size * 2

    def values(self, seed: int) -> dict[str, Any]:
        """Of config.yaml, what is settled here."""
        lora = {"lora": {"r": self.lora, "alpha": 2 * self.lora}} if self.lora else {}
        train = {
            "iterations": self.iterations, "batch_size": self.batch_size, "constraint_batch_size": self.responses or self.batch_size,
            "learning_rate": self.learning_rate, "max_new_tokens": self.max_new_tokens, "save_steps": None,
            "device": "cpu", **lora,
        }  # fmt: skip
        evaluate = {"samples": self.samples, "batch_size": self.sampled_at_once, "initial": False}
        return {"train": train, "evaluate": evaluate, "watch": None, "seed": seed}
