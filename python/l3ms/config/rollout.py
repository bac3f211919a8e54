"""`rollout:`, how often responses are sampled, and what is made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from l3ms.config.sections import Section


class RolloutConfig(Section):
    """Fewer samples than one rollout for each iteration, and responses of an engine whose arithmetic is another."""

    # auto: the constraint half-step is left out while all constraints are comfortably met; at most 4 in a row, none in the warm-up, in the
    # last fifth or while weights are averaged
    every: Literal[1, "auto"] = 1
    # constraint half-steps that are taken from one rollout, in as many iterations, with importance weights; ends early where few responses
    # would count
    reuse: Annotated[int, Field(ge=1, le=64)] = 1
    importance: Literal["none", "truncate"] = (
        "none"  # of the model's probabilities over those of the engine that sampled
    )


def wrong_rollout(
    rollout: RolloutConfig, *, solver: str, half_steps: str, smoothing: str | float
) -> tuple[str, str] | None:
    """(field, why) of what does not go together with how the problem is solved; None where all does."""
    given = {
        name: value for name in ("every", "reuse", "importance") if (value := getattr(rollout, name)) not in (1, "none")
    }
    for name, value in given.items():
        if solver == "none":
            return name, f'must be left out with solver "none", which samples nothing in training, got {value!r}'
        if name == "importance":
            continue
        if half_steps != "alternating":
            return name, (
                f"needs half_steps: alternating, got {half_steps!r}: in a joint step the task's weight is what the constraints of the same "
                "iteration leave it"
            )
        if smoothing != "trend":
            return name, (
                f"needs smoothing: trend, got {smoothing!r}: a moving average does not know how far the policy moves between two rollouts"
            )
    return None
