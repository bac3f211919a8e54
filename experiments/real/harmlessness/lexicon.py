"""Whether a response has a word of a lexicon of profanity (the package better_profanity, its own list)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from better_profanity import Profanity  # pyright: ignore[reportMissingImports]  # of the extra


@cache
def _lexicon() -> Profanity:
    return Profanity()


def clean(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where it has none."""
    return [float(not _lexicon().contains_profanity(_text(completion))) for completion in completions]


clean.binary = True  # type: ignore[attr-defined]  # for certificates


def masked(text: str) -> str:
    """The text with stars for the words of the lexicon, to be printed."""
    return _lexicon().censor(text)


def _text(completion: Any) -> str:
    return (
        completion if isinstance(completion, str) else "\n".join(str(turn.get("content") or "") for turn in completion)
    )
