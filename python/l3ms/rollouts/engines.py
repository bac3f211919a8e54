"""What turns prompts into responses: an engine, what it answers, and what is asked of an answer before it is trained on.

Responses must be of the policy pi_theta as it is scored: whole distribution, no filter, the weights of now. What of that can be seen in an
answer is checked here, in one line that names the engine; that the weights are the policy's is seen by the gap between the engine's
log-likelihoods and the training model's (`l3m/engine_gap` in the log of an `L3MTrainer`).
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ROUNDED = 1e-3  # above which a log-likelihood is none


class Response(NamedTuple):
    """An engine's answer to one prompt."""

    tokens: list[int]  # with the end token that closes it
    ended: bool  # closed by an end token; one that was cut is not
    log_likelihood: list[float] | None = None  # of each token, where it was drawn: of the engine, at the temperature


class Engine(Protocol):
    """Samples responses of the policy. An object with these two, or a function with the arguments of `sample`."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        end: Sequence[int],
        generator: torch.Generator,
    ) -> list[Response]:
        """One response to each prompt, in order, from softmax(logits / temperature) of the whole vocabulary.

        Args:
            prompts: tokens of each.
            end: tokens that close a response.
            generator: all that is drawn comes from it, or from seeds that it gave.
        """
        ...

    def update(self, model: Any) -> None:
        """The policy's weights, before the next `sample`; nothing to do where that samples the model itself."""
        ...


class FunctionEngine:
    """A function with the arguments of `Engine.sample`. It is handed no weights."""

    def __init__(self, function: Any):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        logger.warning(
            "engine: %s is a function, so it must sample the policy as it is now by itself; an object with sample() and update(model) is "
            "handed the weights before each sampling",
            self.name,
        )

    def sample(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Response]:
        return self.function(prompts, **options)

    def update(self, model: Any) -> None:
        """The function has the weights already."""


def as_engine(engine: Any) -> Engine:
    """An engine, or the function that samples.

    Raises:
        ValueError: it is neither.
    """
    if callable(getattr(engine, "sample", None)) and not isinstance(engine, type):
        if callable(getattr(engine, "update", None)):
            return engine
        raise ValueError(
            f"engine: {name_of(engine)} has no update(model), which hands it the policy's weights before each sampling"
        )
    if callable(engine) and not isinstance(engine, type):
        return FunctionEngine(engine)
    what = f"the class {engine.__name__}" if isinstance(engine, type) else repr(engine)
    raise ValueError(
        f"engine: wanted an object with sample(prompts, ...) and update(model), or a function, got {what:.100}"
    )


def name_of(engine: Any) -> str:
    """In errors."""
    return getattr(engine, "name", None) or type(engine).__name__


def check_responses(
    engine: Any, found: Any, *, count: int, max_new_tokens: int, end: Sequence[int], vocabulary: int
) -> list[Response]:
    """What an engine answered to `count` prompts, as plain numbers.

    Raises:
        ValueError: what cannot be responses of the policy, with the engine and the row in its words.
    """
    name = name_of(engine)
    try:
        responses = list(found)
    except TypeError:
        raise ValueError(f"{name}: wanted a list of Response, got {type(found).__name__}") from None
    if len(responses) != count:
        raise ValueError(f"{name}: wanted one response per prompt, {count}, got {len(responses)}")
    checked = [
        _checked(f"{name}: responses[{row}]", item, max_new_tokens, frozenset(end), vocabulary)
        for row, item in enumerate(responses)
    ]
    with_numbers = sum(item.log_likelihood is not None for item in checked)
    if with_numbers not in (0, count):
        raise ValueError(f"{name}: log_likelihood is there for {with_numbers} of {count} responses: give all or none")
    return checked


def _checked(where: str, item: Any, most: int, end: frozenset[int], vocabulary: int) -> Response:
    if not isinstance(item, Response):
        raise ValueError(f"{where}: wanted an l3ms.Response(tokens, ended, log_likelihood), got {type(item).__name__}")
    try:
        if any(isinstance(token, bool) for token in item.tokens):
            raise TypeError
        tokens = [operator.index(token) for token in item.tokens]
    except TypeError:
        raise ValueError(f"{where}: tokens must be integers, got {item.tokens!s:.60}") from None
    if not 0 < len(tokens) <= most:
        raise ValueError(f"{where}: wanted 1 to max_new_tokens={most} tokens, got {len(tokens)}")
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise ValueError(f"{where}: token {token} is not in the model's vocabulary of {vocabulary}")
    closed = [place for place, token in enumerate(tokens) if token in end]
    if closed and closed[0] < len(tokens) - 1:
        raise ValueError(
            f"{where}: end token {tokens[closed[0]]} stands at {closed[0]} of {len(tokens)} tokens: a response ends with its first"
        )
    if bool(item.ended) != bool(closed):
        raise ValueError(
            f"{where}: ended is {bool(item.ended)}, and its last token {tokens[-1]} is "
            f"{'an' if closed else 'no'} end token ({', '.join(map(str, sorted(end)))})"
        )
    if not closed and len(tokens) < most:
        raise ValueError(
            f"{where}: was cut at {len(tokens)} tokens, before max_new_tokens={most}: raise the engine's own limit (vLLM's max_model_len)"
        )
    return Response(tokens, bool(closed), _log_likelihood(where, item.log_likelihood, len(tokens)))


def _log_likelihood(where: str, values: Any, count: int) -> list[float] | None:
    if values is None:
        return None
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: log_likelihood must be numbers, got {values!s:.60}") from None
    if len(numbers) != count:
        raise ValueError(f"{where}: wanted a log_likelihood for each of {count} tokens, got {len(numbers)}")
    for place, number in enumerate(numbers):
        if not math.isfinite(number) or number > ROUNDED:
            raise ValueError(f"{where}: log_likelihood[{place}] must be finite and at most 0, got {number:g}")
    return numbers
