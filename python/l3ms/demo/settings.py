"""How long and how large the two runs of the demo are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Of both runs. Lengths in tokens of the base's tokenizer."""

    iterations: int = 150
    batch_size: int = 32  # task sequences, and as many responses for the constraint
    learning_rate: float = 1e-3  # Adam(0.5, 0.95), 10 warm-up steps, then linear to a tenth
    max_new_tokens: int = 100
    max_length: int = 128  # the rows that are longer (1%) are left out: a batch costs its longest row
    samples: int = 768  # held-out responses per model
    shown: int = 4  # of them, side by side

    @property
    def warmup(self) -> int:
        """Iterations."""
        return min(10, self.iterations - 1)
