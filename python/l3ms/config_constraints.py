"""The `constraints:` of a configuration, one section per kind; `type` says which."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from l3ms.config_sections import Name, NonNegative, Positive, Section, Text


class Bounded(Section):
    """Bounds on the mean of a reward, in its own units (tokens, points); at least one of `min`, `max`."""

    min: float | None = None
    max: float | None = None
    scale: Positive | None = None  # native units per 1.0 of the barrier; default: mid-range, or max(|bound|, 1)
    margin: NonNegative | None = None  # kept inside the bound; default: 2 standard errors of the estimate

    @model_validator(mode="after")
    def _check_bounds(self) -> Bounded:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both: a constraint without a bound constrains nothing")
        if self.min is not None and self.max is not None and not self.min < self.max:
            raise ValueError(f"min must be below max, got min {self.min:g} and max {self.max:g}")
        return self


class LengthConfig(Bounded):
    """Mean response length in tokens, the end-of-sequence token included."""

    type: Literal["length"]
    name: Name = "length"

    @model_validator(mode="after")
    def _check_reachable(self) -> LengthConfig:
        if self.max is not None and self.max <= 1:
            raise ValueError(f"max must be above 1 token (a response has at least its end token), got {self.max:g}")
        return self


class FunctionConfig(Bounded):
    """Mean of a reward function of your own, `f(prompts, completions, **kwargs) -> list[float]`, as in TRL."""

    type: Literal["function"]
    name: Name
    function: Text  # "file.py:name" or "module:name"; imported only with --allow-code

    @model_validator(mode="after")
    def _check_function(self) -> FunctionConfig:
        source, _, name = self.function.rpartition(":")
        if not source or not name.isidentifier():
            raise ValueError(f'function must be "file.py:name" or "module:name", got {self.function!r}')
        return self


ConstraintConfig = Annotated[LengthConfig | FunctionConfig, Field(discriminator="type")]
