"""The sentiment of a response by a lexicon: VADER's compound score (Hutto and Gilbert, ICWSM 2014)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]  # of the extra


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def compound(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """-1 (negative) to 1 (positive); 0 where no word has a sentiment."""
    return [float(_analyzer().polarity_scores(_text(completion))["compound"]) for completion in completions]


compound.reward_range = (-1.0, 1.0)  # type: ignore[attr-defined]  # for certificates


def _text(completion: Any) -> str:
    return (
        completion if isinstance(completion, str) else " ".join(str(turn.get("content") or "") for turn in completion)
    )
