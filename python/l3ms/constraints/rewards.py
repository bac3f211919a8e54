"""Ready-made rewards in TRL's signature: `l3ms.Constraint("ends", l3ms.rewards.ends_with_eos, min=0.95)`.

`ends_with_eos` and `readability` are reward functions; `matches`, `contains`, `avoids`, `ends_with` and `distinct_n` make one from their
options. All read text and conversation completions (the text of the messages), return one float or None per response, and can be pickled.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from l3ms.constraints.patterns import found
from l3ms.constraints.words import Word, canonical, caseless, check_texts
from l3ms.rollouts.prompts import content_text

__all__ = ["avoids", "contains", "distinct_n", "ends_with", "ends_with_eos", "matches", "readability"]

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
MOST_READABLE = 121.22  # one sentence of one-syllable words: the largest value of Flesch's formula


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: of a conversation the contents of its messages, one per line; a turn of calls alone has none."""
    return (
        completion
        if isinstance(completion, str)
        else "\n".join(content_text(turn.get("content")) for turn in completion)
    )


def ends_with_eos(
    prompts: Sequence[Any], completions: Sequence[Any], ended: Sequence[bool], **columns: Any
) -> list[float]:
    """1 where the model closed the response with its end token, 0 where it was cut at the largest length."""
    return [float(done) for done in ended]


ends_with_eos.binary = True  # type: ignore[attr-defined]  # for certificates


def readability(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Flesch reading ease, 206.835 - 1.015 words/sentences - 84.6 syllables/words, clipped to [0, 121.22]: 60-70 is plain English, below
    30 is hard.

    Made for English. Syllables are counted as groups of vowels, less a silent final e; a sentence ends with `.`, `!`, `?` or the text.
    A response without a word has none (None).

    Source: Flesch, A new readability yardstick, Journal of Applied Psychology 32 (1948).
    """
    return [_reading_ease(text_of(completion)) for completion in completions]


def _reading_ease(text: str) -> float | None:
    words = WORD.findall(text)
    if not words:
        return None
    sentences = sum(bool(WORD.search(part)) for part in re.split(r"[.!?]+", text))
    syllables = sum(map(_syllables, words))
    value = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(max(value, 0.0), MOST_READABLE)


def _syllables(word: str) -> int:
    word = word.lower()
    groups = len(re.findall(r"[aeiouyà-æè-ïò-öø-ü]+", word))
    silent = word.endswith("e") and not word.endswith("le") and groups > 1
    return max(groups - silent, 1)


@dataclass(frozen=True)
class matches:
    """1 where the regular expression is found in the response (with `full`: is all of it), else 0.

    Python's `re`, on the text as it is written; flags inline, `(?is)`. A call that takes longer than 10 s, or a second per response where
    that is more, is an error: some patterns take forever.

    Raises:
        ValueError: the pattern is not a regular expression; when called: it takes too long.
    """

    pattern: str
    full: bool = False

    binary = True  # for certificates

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ValueError(f"pattern must be a text, not empty, got {[self.pattern]!r}")
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern must be a regular expression, got {self.pattern!r}: {error}") from None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return list(map(float, found(self.pattern, list(map(text_of, completions)), full=self.full)))


@dataclass(frozen=True)
class contains:
    """The share of `words` (or phrases) that occur in the response, in [0, 1]: whole words, upper and lower case alike.

    A word is whole where its own edge is a letter or digit and no other adjoins. Emoji, punctuation and markup are found anywhere, and so
    are words of languages that are written without spaces (Chinese, Japanese, Thai, ...) or with attached particles (Korean). Apostrophes
    are the same straight or curly, and so are composed and decomposed characters (NFC); full-width letters are others than narrow ones,
    and white space inside a phrase counts as written.

    For "all of them" or "one of them" give the constraint a threshold: 1, or 1 / len(words).

    Raises:
        ValueError: no word, one that is no text, or one that begins with a combining mark or has nothing to be seen.
    """

    words: Sequence[str]
    _words: tuple[Word, ...] = field(init=False, repr=False, compare=False)

    reward_range = (0.0, 1.0)  # for certificates

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", check_texts("words", self.words))
        object.__setattr__(self, "_words", tuple(map(Word, self.words)))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [caseless(text_of(completion)) for completion in completions]
        return [sum(word.in_(text) for word in self._words) / len(self._words) for text in texts]


@dataclass(frozen=True)
class avoids:
    """1 where none of `words` (or phrases) occurs in the response, else 0: whole words in any case, as `contains` finds them.

    Raises:
        ValueError: as `contains`.
    """

    words: Sequence[str]
    _contains: contains = field(init=False, repr=False, compare=False)

    binary = True  # for certificates

    def __post_init__(self) -> None:
        object.__setattr__(self, "_contains", contains(self.words))
        object.__setattr__(self, "words", self._contains.words)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(share == 0) for share in self._contains(prompts, completions)]


@dataclass(frozen=True)
class ends_with:
    """1 where the response ends with `text`, white space at its end aside, else 0. Where `text` itself ends in white space, that must be
    there, and more may follow.

    Raises:
        ValueError: an empty text, or none; one that begins with a combining mark or has nothing to be seen.
    """

    text: str

    binary = True  # for certificates

    def __post_init__(self) -> None:
        check_texts("text", [self.text])

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(self._ends(canonical(text_of(completion)))) for completion in completions]

    def _ends(self, response: str) -> bool:
        ends = range(len(response.rstrip()), len(response) + 1)  # without its white space, and with each part of it
        return any(response.endswith(canonical(self.text), 0, end) for end in ends)


@dataclass(frozen=True)
class distinct_n:
    """Share of different n-grams among the n-grams of a response, in (0, 1]: low where it repeats itself. 1 where it has none.

    Over words (split at white space, as written) or the response's tokens. Source: Li et al., NAACL 2016 (distinct-1, distinct-2), here
    of each response by itself.

    Raises:
        ValueError: n is not a positive integer, or another unit.
    """

    n: int = 2
    unit: Literal["words", "tokens"] = "words"

    reward_range = (0.0, 1.0)  # for certificates

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(f"n must be a positive integer, got {self.n!r}")
        if self.unit not in ("words", "tokens"):
            raise ValueError(f"unit must be words or tokens, got {self.unit!r}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Any,
    ) -> list[float]:
        if self.unit == "tokens":
            return [self._share(ids) for ids in completion_ids]
        return [self._share(text_of(completion).split()) for completion in completions]

    def _share(self, items: Sequence[Any]) -> float:
        counts = Counter(tuple(items[start : start + self.n]) for start in range(len(items) - self.n + 1))
        return len(counts) / counts.total() if counts else 1.0


READY: dict[str, Callable[..., Any]] = {name: globals()[name] for name in __all__}
FUNCTIONS = {"ends_with_eos", "readability"}  # rewards as they are; the others are made from options


def options_of(name: str) -> dict[str, bool]:
    """Option -> whether it must be given, of a ready-made reward."""
    if name in FUNCTIONS:
        return {}
    reward: Any = READY[name]
    return {item.name: item.default is MISSING for item in fields(reward) if item.init}


def make(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """A ready-made reward from its name and options.

    Raises:
        ValueError: begins with the option's name: unknown, missing or of a wrong value.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{option} is no option of {name}; its options: {', '.join(known) or 'none'}")
    for option, required in known.items():
        if required and option not in options:
            raise ValueError(f"{option} is required by {name}")
    return READY[name] if name in FUNCTIONS else READY[name](**options)
