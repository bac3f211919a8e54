"""`constrained(TrainerClass)`: a trainer that people have, under constraints."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer

from l3ms.training.constraining import Constraining
from l3ms.training.given_trainers import GivenTrainer
from l3ms.training.own_samples import OwnSamples

OFFLINE = ("SFTTrainer", "DPOTrainer")
ONLINE = ("GRPOTrainer", "RLOOTrainer")


@functools.cache
def constrained(trainer_class: type) -> Any:
    """A subclass of a trainer's class that meets constraints: `constrained(GRPOTrainer)(..., constraints=[l3ms.Length(max=40)])`.

    Taken are transformers' Trainer, TRL's SFTTrainer, DPOTrainer, GRPOTrainer and RLOOTrainer, and what is derived from them. Arguments are
    those of the class, and

        constraints: what the model's responses must satisfy, or its loss on other data (`DataNLL`), see `Constraint`.
        prompts: what is answered in the constraint half-steps: rows with a "prompt" (text, or messages) and further columns for reward
            functions, or such prompts alone; by default the rows of train_dataset. Not of GRPOTrainer and RLOOTrainer.
        l3m: `L3MSettings`.

    Trainer, SFTTrainer and DPOTrainer take a constraint half-step on fresh samples after each task half-step. GRPOTrainer and RLOOTrainer
    sample nothing more: their own samples are weighed, see `own_samples`. docs/trl.md has what of TRL is kept and what is refused.

    Raises:
        ValueError: a class that is none of these; when a trainer is made: an option that cannot be honoured, by name.
    """
    name = getattr(trainer_class, "__name__", str(trainer_class))
    if not isinstance(trainer_class, type) or not issubclass(trainer_class, Trainer):
        raise ValueError(
            f"constrained: wanted a class of trainers, transformers.Trainer or one derived from it, got {name}"
        )
    if issubclass(trainer_class, Constraining):
        raise ValueError(f"constrained: {name} takes constraints already")
    of_trl = [cls.__name__ for cls in trainer_class.__mro__ if cls.__module__.partition(".")[0] == "trl"]
    known = [cls for cls in of_trl if cls in (*OFFLINE, *ONLINE)]
    if of_trl and not known:
        raise ValueError(
            f"constrained: of TRL's trainers {', '.join((*OFFLINE, *ONLINE))} are taken, got {name}; with another one make the constraint "
            "half-steps of an L3MOptimizer in a loop of your own"
        )
    kind = OwnSamples if known and known[0] in ONLINE else GivenTrainer
    return type(f"Constrained{name}", (kind, trainer_class), {"given_name": name, "__module__": __name__})
