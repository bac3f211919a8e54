"""Words in a text, by Unicode: which writings are the same, and where a word begins and ends.

Two texts are the same where they are canonically equivalent (NFC: an e with an accent is one character or two) and, for words, where only
their case differs (full case folding, dotted and dotless i alike, apostrophes straight or curly). Compatibility forms (NFKC: full-width
letters, ligatures' kin such as superscripts) are other characters. What has no form of its own is not read: soft hyphens, variation
selectors, direction marks, joiners behind a letter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import regex

# Between emoji a joiner makes another picture, and a zero-width space separates words: those stay.
INVISIBLE = regex.compile(
    "[\u00ad\u034f\u061c\u180b-\u180f\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
JOINERS = regex.compile(r"(?<=[\p{L}\p{M}])[\u200c\u200d]+")

# Scripts that write words without a space between them; Korean, which attaches its particles, is one of them here.
UNSEPARATED = (
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Hangul", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"),
    *("Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese"),
)
_SCRIPTS = "".join(rf"\p{{scx={script}}}" for script in UNSEPARATED)
_LETTER = rf"[[[\p{{L}}\p{{N}}]--[{_SCRIPTS}]]\p{{Nd}}]"  # or digit, of a script that separates words
LETTER = regex.compile(rf"(?V1){_LETTER}")
# Underscores that join two letters are part of the word, those around one (markdown) are not.
LETTER_BEFORE = regex.compile(rf"(?V1)(?<={_LETTER}\p{{M}}*_*)")
LETTER_BEHIND = regex.compile(rf"(?V1)_*{_LETTER}")
MARK = regex.compile(r"\p{M}")
HALF_FLAG_BEFORE = regex.compile(r"(?<=(?<!\p{RI})(?:\p{RI}{2})*\p{RI})")


def canonical(text: str) -> str:
    """Equal for texts that are the same, case included."""
    return unicodedata.normalize("NFC", JOINERS.sub("", INVISIBLE.sub("", text)))


FOLDED = str.maketrans({"\u0131": "i", "\u2018": "'", "\u2019": "'", "\u02bc": "'"})


def caseless(text: str) -> str:
    """Equal for texts that are the same in any case."""
    folded = unicodedata.normalize("NFD", canonical(text)).casefold()
    folded = unicodedata.normalize("NFD", folded).replace("i\u0307", "i")  # of a capital I with a dot
    return unicodedata.normalize("NFC", folded.translate(FOLDED))


def check_texts(option: str, texts: Any) -> tuple[str, ...]:
    """The texts, each with a character of its own at the beginning.

    Raises:
        ValueError: begins with `option`.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"{option} must be a list of texts, got {texts!r}")
    wanted = f"{option} must be {'texts' if option == 'words' else 'a text'}"
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{wanted}, not empty, got {list(texts)!r}")
    for text in texts:
        if not canonical(text):
            raise ValueError(f"{wanted} that can be seen, got {text!a}")
        if MARK.match(canonical(text)):
            raise ValueError(
                f"{wanted} with a character to begin with, got {text!a}: its first mark belongs to the one before"
            )
    return tuple(texts)


class Word:
    """A word or phrase, to be found as a whole: `in_(caseless(text))`.

    Where its edge is a letter or digit of a script that separates words, no other such may follow. Elsewhere (emoji, punctuation, markup,
    Chinese, Thai) it may stand inside a run. A combining mark belongs to the character before it everywhere.
    """

    def __init__(self, word: str):
        self.text = caseless(word)
        base = regex.sub(r"\p{M}+$", "", self.text)
        self.letter_first = LETTER.match(self.text) is not None
        self.letter_last = LETTER.match(base, len(base) - 1) is not None

    def in_(self, text: str) -> bool:
        """Whether it stands in a text that is `caseless`."""
        start = text.find(self.text)
        while start >= 0:
            if self._whole(text, start, start + len(self.text)):
                return True
            start = text.find(self.text, start + 1)
        return False

    def _whole(self, text: str, start: int, end: int) -> bool:
        if MARK.match(text, end) or (self.letter_last and LETTER_BEHIND.match(text, end)):
            return False
        return not (self.letter_first and LETTER_BEFORE.match(text, start)) and not (
            "\U0001f1e6" <= self.text[0] <= "\U0001f1ff" and HALF_FLAG_BEFORE.match(text, start)
        )
