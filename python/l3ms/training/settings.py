"""`L3MSettings`: what constraints add to a training, whatever trainer it is of; `L3MConfig` has them beside transformers' own arguments."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from pydantic import ValidationError

from l3m_kernels import initial_state
from l3ms.barrier.solvers import SOLVERS, AugmentedLagrangian, DualAscent, Penalty, Solver
from l3ms.config.errors import explain
from l3ms.config.rollout import RolloutConfig, wrong_rollout

WHOLE = ("constraint_batch_size", "max_new_tokens", "rollout_reuse", "agree_every")
NUMBERS = ("dual_rate", "penalty", "mu_end", "temperature", "average_fraction")


@dataclass
class L3MSettings:
    """How the constraints of `constrained(TrainerClass)` are met; each field says what it is in its `metadata["help"]`.

    The responses that are sampled for the constraints are those of `constraint_batch_size`, `max_new_tokens`, `temperature` and
    `rollout_*`; a trainer that samples by itself (GRPO, RLOO) has its own arguments for that, and these are refused there.

    Raises:
        ValueError: a value is wrong (named).
    """

    solver: str = field(default="barrier", metadata={"help": f"{', '.join(SOLVERS)}, or none: without the constraints"})
    dual_rate: float = field(default=0.5, metadata={"help": "of dual_ascent and augmented_lagrangian, see solvers"})
    penalty: float = field(default=5.0, metadata={"help": "of augmented_lagrangian and penalty, see solvers"})
    mu: str = field(default="auto", metadata={"help": "auto: decay to the noise floor; paper: decay to mu_end"})
    mu_end: float = field(default=1e-6, metadata={"help": "where the decay of mu from 1 ends"})
    smoothing: str = field(  # a number, or one in a text, is right too
        default="trend",
        metadata={"help": "of the estimates: trend, ema, or the weight of a new batch, see L3MOptimizer"},
    )
    constraint_batch_size: int = field(default=32, metadata={"help": "responses per iteration and rank"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest response"})
    temperature: float = field(default=1.0, metadata={"help": "of the sampled responses"})
    half_steps: str | None = field(
        default=None,
        metadata={
            "help": "alternating: task and constraints step in turn, each clipped; joint: one step on their sum, clipped; by default "
            "joint where the task's own samples are weighed, else alternating"
        },
    )
    rollout_every: str = field(  # the number 1 is right too
        default="1",
        metadata={"help": "1, or auto: constraint half-steps are left out while all constraints are comfortably met"},
    )
    rollout_reuse: int = field(default=1, metadata={"help": "constraint half-steps from one rollout, at most"})
    rollout_importance: str = field(
        default="none",
        metadata={"help": "truncate: importance weights where an engine's probabilities are not the model's; or none"},
    )
    clipping: str = field(default="adaptive", metadata={"help": "adaptive or separate, see L3MOptimizer"})
    length_norm: str = field(default="mean", metadata={"help": "mean, sequence or none, see L3MOptimizer"})
    nonfinite: str = field(default="raise", metadata={"help": "a reward that is NaN or inf: raise, or drop and count"})
    average_fraction: float = field(
        default=0.0, metadata={"help": "last share of the iterations whose weights are averaged"}
    )
    agree_every: int = field(
        default=50,
        metadata={"help": "iterations after which ranks compare multipliers, mu and weights, bit for bit; 0: never"},
    )

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises `ValueError` for a value that is wrong."""
        for names, kind, what in ((WHOLE, Integral, "whole number"), (NUMBERS, Real, "number")):
            for name in names:
                if isinstance(value := getattr(self, name), bool) or not isinstance(value, kind):
                    raise ValueError(f"{name} must be a {what}, got {value!r}")
        if self.solver not in (*SOLVERS, "none"):
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, none, got {self.solver!r}")
        self.solver_object()
        if self.half_steps not in ("alternating", "joint", None):
            raise ValueError(f"half_steps must be alternating or joint, got {self.half_steps!r}")
        if self.mu not in ("auto", "paper"):
            raise ValueError(f"mu must be auto or paper, got {self.mu!r}")
        if self.smoothing not in ("trend", "ema"):
            try:
                self.smoothing = float("" if isinstance(self.smoothing, bool) else self.smoothing)  # type: ignore[assignment]
            except (TypeError, ValueError):
                raise ValueError(
                    f"smoothing must be trend, ema or a number in (0, 1], got {self.smoothing!r}"
                ) from None
            initial_state(0, smoothing=self.smoothing)  # type: ignore[arg-type]  # says whether it can be
        if self.nonfinite not in ("raise", "drop"):
            raise ValueError(f"nonfinite must be raise or drop, got {self.nonfinite!r}")
        if self.constraint_batch_size < 2:
            raise ValueError(
                f"constraint_batch_size must be at least 2 (leave-one-out baseline), got {self.constraint_batch_size}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if not 0 <= self.average_fraction <= 1:
            raise ValueError(f"average_fraction must be in [0, 1], got {self.average_fraction}")
        if self.agree_every < 0:
            raise ValueError(f"agree_every must be at least 0 (never), got {self.agree_every}")
        self._check_rollout()

    def _check_rollout(self) -> None:
        every: Any = 1 if self.rollout_every in (1, "1") else self.rollout_every
        self.rollout_every = str(self.rollout_every)
        try:
            rollout = RolloutConfig(every=every, reuse=self.rollout_reuse, importance=self.rollout_importance)  # type: ignore[arg-type]
        except ValidationError as error:
            wrong = explain(error, RolloutConfig)
            raise ValueError(f"rollout_{wrong.field} {wrong.message}") from None
        half_steps = self.half_steps or "alternating"
        options = {"solver": self.solver, "half_steps": half_steps, "smoothing": self.smoothing}
        if (found := wrong_rollout(rollout, **options)) is not None:
            raise ValueError(f"rollout_{found[0]} {found[1]}")

    def solver_object(self) -> str | Solver:
        """As `L3MOptimizer` takes it, with its settings."""
        made: dict[str, Callable[[], Solver]] = {
            "dual_ascent": lambda: DualAscent(self.dual_rate),
            "augmented_lagrangian": lambda: AugmentedLagrangian(self.dual_rate, self.penalty),
            "penalty": lambda: Penalty(self.penalty),
        }
        return made[self.solver]() if self.solver in made else self.solver
