"""The `constraints:` of a configuration, one section per kind; `type` says which."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from l3ms.config.data import DataConfig
from l3ms.config.sections import MOST, Batch, Bound, Count, Name, NonNegative, Positive, Section, Share, Text
from l3ms.constraints import rewards
from l3ms.constraints.constraint import BOUNDING, NO_REFERENCE
from l3ms.constraints.shares import PER_TOKEN_SHARE, event_of, wrong_probability, wrong_quantile


class Bounded(Section):
    """Bounds on the mean of a reward, in its own units (tokens, points, nats); at least one of `min`, `max`."""

    min: Bound | None = None
    max: Bound | None = None
    scale: Positive | None = None  # native units per 1.0 of the barrier; default: mid-range, or max(|bound|, 1)
    margin: NonNegative | None = None  # kept inside the bound; default: 2 standard errors of the estimate
    monitor: bool = False  # only measured: no bounds, and no part in the training

    @model_validator(mode="after")
    def _check_bounds(self) -> Bounded:
        if self.monitor:
            for option in BOUNDING:
                if getattr(self, option) is not None:
                    raise ValueError(f"{option} is for a constraint, and a monitor bounds nothing")
        elif self.min is None and self.max is None:
            raise ValueError("give min, max or both: a constraint without a bound constrains nothing")
        if self.min is not None and self.max is not None and not self.min < self.max:
            raise ValueError(f"min must be below max, got min {self.min:g} and max {self.max:g}")
        return self


class Sampled(Bounded):
    """On the model's own responses. With `threshold` the bounds are on the share of responses whose reward is at least that; with
    `quantile` the one bound is on that quantile of the reward, which is a share too."""

    threshold: Bound | None = None
    quantile: Share | None = None  # 0.05 with min: 4: at most 5% below 4; 0.95 with max: 40: at most 5% above 40

    @model_validator(mode="after")
    def _check_shares(self) -> Sampled:
        item = vars(self)
        wrong = (wrong_quantile(item) if self.quantile is not None else None) or wrong_probability(item)
        if wrong:
            raise ValueError(wrong)
        return self


class LengthConfig(Sampled):
    """Mean response length in tokens, the end-of-sequence token included."""

    type: Literal["length"]
    name: Name = "length"

    @model_validator(mode="after")
    def _check_reachable(self) -> LengthConfig:
        if self.max is not None and event_of(vars(self)) is None and self.max <= 1:
            raise ValueError(f"max must be above 1 token (a response has at least its end token), got {self.max:g}")
        if self.max is not None and self.quantile is not None and self.max < 1:
            raise ValueError(f"max must be at least 1 token (a response has at least its end token), got {self.max:g}")
        return self


class FunctionConfig(Sampled):
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


class RewardModelConfig(Sampled):
    """Mean score of a sequence classifier. Code that comes with a checkpoint is never run."""

    type: Literal["reward_model"]
    name: Name
    model: Text  # folder, or hub id
    head: Annotated[int, Field(ge=0, le=MOST)] = 0  # which output is the score
    squash: Literal["tanh", "sigmoid"] | None = None  # of the score
    batch_size: Batch = 16
    max_length: Annotated[int, Field(ge=2, le=MOST)] | None = None  # tokens; longer texts lose their beginning
    chat_template: Literal["auto", True, False] = "auto"


class DataNLLConfig(Bounded):
    """Mean loss on a second data set, nats per token: no sampling."""

    type: Literal["data_nll"]
    name: Name
    data: DataConfig
    batch_size: Batch = 8  # rows per constraint half-step
    relative: bool = False  # bounds what it is above the loss of a frozen reference on the same rows
    reference: Text | None = None  # folder, or hub id; default: the model that the run starts from

    @model_validator(mode="after")
    def _check_reference(self) -> DataNLLConfig:
        if self.reference is not None and not self.relative:
            raise ValueError(NO_REFERENCE)
        return self


class KLConfig(Sampled):
    """Divergence from a frozen reference, nats per response."""

    type: Literal["kl"]
    name: Name = "kl"
    reference: Text | None = None  # folder, or hub id; default: the model that the run starts from
    per_token: bool = False
    batch_size: Batch = 16

    @model_validator(mode="after")
    def _check_share(self) -> KLConfig:
        if self.per_token and event_of(vars(self)) is not None:
            raise ValueError(PER_TOKEN_SHARE)
        return self


class ReadyRewardConfig(Sampled):
    """Mean of a ready-made reward of `l3ms.rewards`, with the options that it has."""

    type: Literal["reward"]
    name: Name
    reward: Literal["avoids", "contains", "distinct_n", "ends_with", "ends_with_eos", "matches", "readability"]
    words: Annotated[list[Text], Field(min_length=1)] | None = None  # contains, avoids
    text: Text | None = None  # ends_with
    pattern: Text | None = None  # matches: a regular expression
    full: bool | None = None  # matches: all of the response
    n: Count | None = None  # distinct_n
    unit: Literal["words", "tokens"] | None = None  # distinct_n

    @property
    def options(self) -> dict[str, Any]:
        """The options of the reward that were given."""
        names = set(type(self).model_fields) - set(Sampled.model_fields) - {"type", "name", "reward"}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _check_options(self) -> ReadyRewardConfig:
        rewards.make(self.reward, self.options)
        return self


ConstraintConfig = Annotated[
    LengthConfig | FunctionConfig | RewardModelConfig | DataNLLConfig | KLConfig | ReadyRewardConfig,
    Field(discriminator="type"),
]
