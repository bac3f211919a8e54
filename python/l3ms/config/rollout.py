"""`rollout:`, what samples the responses, how often, and what is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from l3ms.config.sections import Section, Text


def _one_is_a_number(value: Any) -> Any:
    """To a Literal `true` is 1, and 1.0 is."""
    if value == 1 and type(value) is not int:
        raise ValueError(f"must be 1 or 'auto', got {value!r}")
    return value


class RolloutConfig(Section):
    """Who samples responses (the model itself, a vLLM in this process or on a server, your own code: docs/engines.md), and how often."""

    engine: Text = "transformers"  # vllm; "file.py:name" or "module:name", imported only with --allow-code
    server: Text | None = None  # of vllm: http://host:8000 of a `vllm serve`; default: in this process
    folder: Text | None = (
        None  # of a server: where it reads the weights, a folder that both see; default: a temporary one
    )
    options: dict[Text, bool | int | float | str | None] = Field(
        default={}
    )  # of vllm.LLM: max_model_len, enforce_eager, ...
    # auto: the constraint half-step is left out while all constraints are comfortably met; at most 4 in a row, none in the warm-up, in the
    # last fifth or while weights are averaged
    every: Annotated[Literal[1, "auto"], BeforeValidator(_one_is_a_number)] = 1
    # constraint half-steps that are taken from one rollout, in as many iterations, with importance weights; ends early where few responses
    # would count
    reuse: Annotated[int, Field(ge=1, le=64)] = 1
    importance: Literal["none", "truncate"] = (
        "none"  # of the model's probabilities over those of the engine that sampled
    )

    @property
    def code(self) -> str | None:
        """What of it is somebody's code."""
        return None if self.engine in ("transformers", "vllm") else self.engine

    @model_validator(mode="after")
    def _check_engine(self) -> RolloutConfig:
        source, _, name = self.engine.rpartition(":")
        if self.code is not None and not (source and name.isidentifier()):
            raise ValueError(
                f'engine must be transformers, vllm, "file.py:name" or "module:name", got {self.engine!r:.80}'
            )
        if self.server is not None and self.engine != "vllm":
            raise ValueError(f"server is of the engine vllm, and engine is {self.engine!r:.80}: leave it out")
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            raise ValueError(f"server must begin with http:// or https://, got {self.server!r:.80}")
        if self.folder is not None and self.server is None:
            raise ValueError("folder is of a server, and there is none: leave it out")
        if self.options and (self.engine != "vllm" or self.server is not None):
            where = "a server has its own" if self.server is not None else f"engine is {self.engine!r:.80}"
            raise ValueError(f"options are of a vLLM in this process, and {where}: leave them out")
        return self


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
