"""What the model's own behaviour must satisfy, in native units (tokens, reward points).

A kind of constraint says where its values come from: `call` (prompts and completions, as in TRL), or `ask` where it needs the rollout and
the model. What is common to all stands here: the bounds and the checks of what came back. What turns rewards into shares is in `shares`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsFloat

from l3ms.constraints import async_rewards
from l3ms.constraints.reward_values import numbers
from l3ms.constraints.shares import Event, bounds_of, event_of, wrong_probability, wrong_quantile
from l3ms.constraints.trl_arguments import NAMES, trl_arguments
from l3ms.rollouts.rollout import Rollout

Rewards = Sequence[float | None]
Reward = Callable[..., Rewards | Awaitable[Rewards]]

# What a function of texts raises on lists, and what it is told.
SHAPE_ERRORS = (AttributeError, KeyError, IndexError, TypeError)
MESSAGES = (
    "prompts and completions are lists of messages here, since the model has a chat template: "
    'read completion[-1]["content"], or keep text prompts plain with chat_template false'
)

BOUNDING = ("min", "max", "scale", "margin")  # the options that a monitor has no use for
NO_REFERENCE = "reference is what a relative loss is measured from: give relative too"


@dataclass(frozen=True)
class Constraint:
    """Bounds on the mean of a reward over the model's own responses: `min <= E[r] <= max`.

    Args:
        name: how it appears in metrics (`constraints/<name>/...`) and in errors.
        function: TRL's reward signature, `(prompts, completions, **columns) -> list[float]`, one value per response; `None` in the list
            excludes that response. May be asynchronous (return an awaitable): those of a rollout run at the same time. Without
            `**columns` it gets the ones it names; of every rollout `completion_ids`, `ended` and `raw_completions` (texts with special
            tokens). Where the tokenizer has a chat template, prompts and completions are lists of messages. TRL's `trainer_state`,
            `log_extra` and `log_metric` are given as well, see `trl_arguments`. What it gets are lists of its own. Without a function the
            values come through `L3MOptimizer.observe` or `.barrier_loss`.
        min, max: bounds in native units; at least one.
        threshold: makes it a chance constraint, `min <= P(r >= threshold) <= max`: the reward is replaced by 1 where it is at least the
            threshold and 0 elsewhere, and the bounds are probabilities.
        quantile: makes `min` or `max` a bound on that quantile of the reward, in native units: `quantile=0.05, min=4` says that at most 5%
            of the responses are below 4, `quantile=0.95, max=40` that at most 5% are above 40. It is the chance constraint
            `P(r >= min) >= 1 - quantile`, or `P(r <= max) >= quantile`, ties included (`shares` has the proof), and that share is what is
            estimated, logged and certified. One of min and max: two bounds are two constraints.
        scale: native units per 1.0 of the dimensionless constraint; by default the middle of [min, max], or max(|bound|, 1) for one
            bound, and 1 for a share. It sets how a violation here weighs against one of another constraint.
        margin: how far inside the bound to settle, in native units (of a share: a share); by default 2 standard errors of the estimate,
            at most a quarter of the range, since a barrier whose mu has decayed settles at the bound itself.
        monitor: only measure it: its estimate is logged beside those of the constraints, and it has no part in the training. It takes no
            min, max, scale or margin.

    Raises:
        ValueError: no bound, or one of a monitor, min > max, a bound that is not finite, scale <= 0, a margin that leaves no room; a
            threshold with a bound that is no probability; a quantile outside of (0, 1), with a threshold, with two bounds, or of a monitor;
            either where there is no function to apply it to.
    """

    name: str
    function: Reward | None = None
    min: float | None = field(default=None, kw_only=True)
    max: float | None = field(default=None, kw_only=True)
    scale: float | None = field(default=None, kw_only=True)
    margin: float | None = field(default=None, kw_only=True)
    threshold: float | None = field(default=None, kw_only=True)
    quantile: float | None = field(default=None, kw_only=True)
    monitor: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        where = f"constraint {self.name!r}"
        if not self.name or "/" in self.name:
            raise ValueError(f"{where}: name must be a non-empty text without '/'")
        if self.monitor:
            for option in BOUNDING:
                if getattr(self, option) is not None:
                    raise ValueError(f"{where}: {option} is for a constraint, and a monitor bounds nothing")
        elif self.min is None and self.max is None:
            raise ValueError(f"{where}: give min, max or both")
        for option in ("min", "max", "scale", "margin", "threshold", "quantile"):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
                raise ValueError(f"{where}: {option} must be a finite number, got {value!r}")
        if self.quantile is not None and (wrong := wrong_quantile(vars(self))):
            raise ValueError(f"{where}: {wrong}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"{where}: min must be at most max, got min {self.min:g} > max {self.max:g}")
        if not math.isfinite(self.unit) or (self.min is not None and self.max is not None and self.width == math.inf):
            raise ValueError(
                f"{where}: min and max must be numbers whose sum and difference are finite, got {self.min:g} and {self.max:g}"
            )
        if self.event is not None and not self.samples:
            option = "threshold" if self.quantile is None else "quantile"
            raise ValueError(f"{where}: {option} needs a function, or a kind that samples responses")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"{where}: scale must be positive, got {self.scale:g}")
        if self.margin is not None and (self.margin < 0 or (self.margin > 0 and 2 * self.margin >= self.width)):
            raise ValueError(f"{where}: margin must be >= 0 and less than half of the range, got {self.margin:g}")
        if wrong := wrong_probability(vars(self)):
            raise ValueError(f"{where}: {wrong}")

    @property
    def event(self) -> Event | None:
        """What counts as 1 where a share is bounded; None where it is the mean of the reward."""
        return event_of(vars(self))

    @property
    def low(self) -> float | None:
        """Least value of what is estimated: `min`, or the share that a bound on a quantile comes to."""
        return bounds_of(vars(self))[0]

    @property
    def high(self) -> float | None:
        """Largest value of what is estimated; None where a quantile is bounded."""
        return bounds_of(vars(self))[1]

    @property
    def width(self) -> float:
        """high - low in native units, inf for a one-sided constraint."""
        return math.inf if self.low is None or self.high is None else self.high - self.low

    @property
    def unit(self) -> float:
        """Native units per 1.0 of the dimensionless constraint."""
        if self.scale is not None:
            return self.scale
        if self.event is not None or self.monitor:
            return 1.0
        if self.min is not None and self.max is not None:
            # A range around 0 has no middle to speak of: its half-width then.
            return max(abs(self.min + self.max) / 2, self.width / 2) or 1.0
        return max(abs(self.max if self.min is None else self.min), 1.0)  # type: ignore[arg-type]

    def rows(self, reward: int) -> list[tuple[int, float, float, float, float, float, float]]:
        """One-sided constraints on reward number `reward`, lower bound first: the rows of `l3m_kernels.Bounds`."""
        margins = (0.0, 2.0, self.width / 4) if self.margin is None else (self.margin, 0.0, math.inf)
        sides = ((-1.0, self.low), (1.0, self.high))
        return [(reward, sign, float(bound), self.unit, *margins) for sign, bound in sides if bound is not None]

    @property
    def samples(self) -> bool:
        """Whether its values come from the model's responses by themselves (a function, or the length)."""
        return self.function is not None

    @property
    def data(self) -> bool:
        """Whether its values are a loss on a data set of its own, which needs no responses."""
        return False

    @property
    def where(self) -> str:
        """How errors name it: with its function, where there is one."""
        function = (
            "" if self.function is None else f": {getattr(self.function, '__name__', type(self.function).__name__)}"
        )
        return f"constraint {self.name!r}{function}"

    def prepare(self, model: Any) -> None:
        """Called once with the model before it is trained; kinds that compare with it keep what they need."""

    # ---- where the values come from: what a kind overrides ----

    def call(
        self, prompts: Sequence[Any], completions: Sequence[Any], lengths: Sequence[int], **columns: Any
    ) -> Rewards | Awaitable[Rewards]:
        """What the function returns, not checked: n values, or an awaitable of them."""
        if self.function is None:
            raise ValueError(
                f"constraint {self.name!r} has no function; give its values to observe() or barrier_loss()"
            )
        given = _accepted(self.function, columns)
        return self.function(**_own({"prompts": prompts, "completions": completions, **given}))

    def ask(self, rollout: Rollout, model: Any = None) -> Rewards | Awaitable[Rewards]:
        """As `call`, of a rollout; `model` is the policy that it was sampled from."""
        columns = {**rollout.reward_columns(), **trl_arguments(), **rollout.training}
        return self.call(rollout.prompts, rollout.completions, rollout.host_lengths, **columns)

    # ---- the values ----

    def begin(self, rollout: Rollout, model: Any = None) -> Asked:
        """Ask, and let an asynchronous function run in the background until the values are wanted."""
        with _named(self.where, rollout.completions):
            return Asked(self, async_rewards.begin(self.ask(rollout, model)), len(rollout), rollout.completions)

    def measure(self, rollout: Rollout, model: Any = None) -> list[float | None]:
        """One value per response of a rollout, NaN and inf let through; 0 or 1 where a share is bounded.

        Raises:
            ValueError: a wrong number of values, or a value that is no number: names the function and row.
            What the function raises, with the constraint and the function in its words.
        """
        return self.begin(rollout, model).values()

    def rewards(
        self, prompts: Sequence[Any], completions: Sequence[Any], lengths: Sequence[int], **columns: Any
    ) -> list[float | None]:
        """The reward of each response (1 or 0 where a share is bounded), checked.

        Raises:
            ValueError: no function, a wrong number of values, a value that is no number or not finite: names the function and row.
        """
        values = self.values(prompts, completions, lengths, **columns)
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{self.where}: row {row} is {value}; return None to exclude a response")
        return self.indicator(values)

    def values(
        self, prompts: Sequence[Any], completions: Sequence[Any], lengths: Sequence[int], **columns: Any
    ) -> list[float | None]:
        """The rewards themselves, no indicators, NaN and inf let through: `L3MOptimizer(nonfinite=...)` decides about those."""
        with _named(self.where, completions):
            answer = async_rewards.begin(self.call(prompts, completions, lengths, **columns))
            return self.checked(async_rewards.wait(answer), len(completions))

    def indicator(self, values: Sequence[float | None]) -> list[float | None]:
        """1 where a value is of the `event`, else 0; as they are where the mean is bounded, and where missing or not finite."""
        event = self.event
        if event is None:
            return list(values)
        return [v if v is None or not math.isfinite(v) else event.indicator(v) for v in values]

    def checked(self, values: Any, count: int) -> list[float | None]:
        """What a function returned, as a list of `count` numbers, see `reward_values`.

        Raises:
            ValueError: no list, a wrong number of values, or a value that is no number: names the function and row.
        """
        return numbers(self.where, values, count)


class Asked(NamedTuple):
    """A constraint that was asked about a rollout of `count` responses."""

    constraint: Constraint
    answer: Any  # of its function, or on its way
    count: int
    completions: Sequence[Any] = ()

    def values(self) -> list[float | None]:
        """As `Constraint.measure`."""
        with _named(self.constraint.where, self.completions):
            return self.constraint.indicator(self.constraint.checked(async_rewards.wait(self.answer), self.count))

    def cancel(self) -> None:
        async_rewards.cancel(self.answer)


def _accepted(function: Reward, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that a function takes: all of them, or those it names where it has no `**columns`. What it asks of a training it gets
    in any case."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables in C have no signature
        return {name: value for name, value in columns.items() if name not in NAMES}
    named = {parameter.name for parameter in parameters}
    if not named.isdisjoint(NAMES) and not columns.keys() >= named.intersection(NAMES):
        columns = {**{name: value for name, value in trl_arguments().items() if name in named}, **columns}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    return {name: value for name, value in columns.items() if name in named}


def _own(value: Any) -> Any:
    """Lists and dicts of a function's own: it may change them, the rollout and what other functions get stay as they are."""
    if type(value) is dict:
        return {name: _own(item) for name, item in value.items()}
    return type(value)(map(_own, value)) if type(value) in (list, tuple) else value


@contextlib.contextmanager
def _named(where: str, completions: Sequence[Any] = ()) -> Iterator[None]:
    """Around what a function does: an error says whose, and stays of its kind, which callers may catch. That of a function of texts on
    messages says nothing of them by itself."""
    try:
        yield
    except Exception as error:
        if where not in str(error) and len(error.args) < 2 and all(isinstance(words, str) for words in error.args):
            given = (
                [MESSAGES]
                if isinstance(error, SHAPE_ERRORS) and completions and isinstance(completions[0], list)
                else []
            )
            error.args = ("; ".join([": ".join([where, *error.args]), *given]),)
        if where not in str(
            error
        ):  # it makes its words of something else: a note, which Python 3.11 prints, and our commands do
            error.__dict__.setdefault("__notes__", []).append(f"in {where}")
        raise


class Length(Constraint):
    """Bounds on the mean response length in tokens, the closing EOS included; with a threshold on the share of responses of at least
    that many tokens, with a quantile on that quantile: `Length(min=4, quantile=0.05, name="not short")`."""

    def __init__(
        self,
        min: float | None = None,
        max: float | None = None,
        *,
        scale: float | None = None,
        margin: float | None = None,
        threshold: float | None = None,
        quantile: float | None = None,
        monitor: bool = False,
        name: str = "length",
    ):
        super().__init__(
            name, min=min, max=max, scale=scale, margin=margin, threshold=threshold, quantile=quantile, monitor=monitor
        )  # fmt: skip

    @property
    def samples(self) -> bool:
        return True

    def call(
        self, prompts: Sequence[Any], completions: Sequence[Any], lengths: Sequence[int], **columns: Any
    ) -> list[float | None]:
        return [float(length) for length in lengths]


def check_constraints(constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
    """The constraints as a tuple; ValueError for a wrong type or a name used twice."""
    if isinstance(constraints, Constraint) or not isinstance(constraints, Iterable):
        raise ValueError(f"constraints must be a list of l3ms.Constraint objects, got {type(constraints).__name__}")
    constraints, seen = tuple(constraints), set[str]()
    for item in constraints:
        if not isinstance(item, Constraint):
            raise ValueError(f"constraints must be l3ms.Constraint objects, got {type(item).__name__}")
        if item.name in seen:
            raise ValueError(f"constraints: the name {item.name!r} is used twice; give one of them another name")
        seen.add(item.name)
    return constraints
