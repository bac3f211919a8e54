"""Words in a text, by Unicode: which writings are the same, and where a word begins and ends.

Two texts are the same where they are canonically equivalent (NFC: an e with an accent is one character or two) and, for words, where only
their case differs (full case folding, dotted and dotless i alike, apostrophes straight or curly). Compatibility forms (NFKC: full-width
letters, superscripts) are other characters. What has no form of its own is not read: soft hyphens, variation
selectors, direction marks, joiners behind a letter.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

# Between emoji a joiner makes another picture, and a zero-width space separates words: those stay.
_INVISIBLE = "\u00ad\u034f\u061c\u180b-\u180f\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef"
INVISIBLE = re.compile(f"[{_INVISIBLE}]+")
JOINED = re.compile("(.)[\u200c\u200d]+", re.DOTALL)
APOSTROPHES_AND_I = str.maketrans({"\u0131": "i", "\u2018": "'", "\u2019": "'", "\u02bc": "'"})

# How the names of letters begin in scripts that write words without a space between them, and in Korean, which attaches particles.
UNSEPARATED = (
    *(
        "CJK ",
        "IDEOGRAPHIC ",
        "HIRAGANA ",
        "KATAKANA",
        "HALFWIDTH KATAKANA",
        "BOPOMOFO ",
        "HANGUL ",
        "HALFWIDTH HANGUL",
        "YI ",
    ),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE "),
)


def canonical(text: str) -> str:
    """Equal for texts that are the same, case included."""
    seen = JOINED.sub(lambda found: found[1] if _category(found[1]) in "LM" else found[0], INVISIBLE.sub("", text))
    return unicodedata.normalize("NFC", seen.lstrip("\u200c\u200d"))


def caseless(text: str) -> str:
    """Equal for texts that are the same in any case."""
    folded = unicodedata.normalize("NFD", canonical(text)).casefold()
    folded = unicodedata.normalize("NFD", folded).replace("i\u0307", "i")  # of a capital I with a dot
    return unicodedata.normalize("NFC", folded.translate(APOSTROPHES_AND_I))


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
        if all(unicodedata.category(character) == "Cf" for character in canonical(text)):
            raise ValueError(f"{wanted} that can be seen, got {text!a}")
        if is_mark(canonical(text)[0]):
            raise ValueError(
                f"{wanted} with a character to begin with, got {text!a}: its first mark belongs to the one before"
            )
    return tuple(texts)


def _category(character: str) -> str:
    """Its first letter: L letters, M marks, N numbers, ..."""
    return unicodedata.category(character)[0]


def is_mark(character: str) -> bool:
    return _category(character) == "M"


@functools.lru_cache(maxsize=4096)
def is_letter(character: str) -> bool:
    """Or a digit, of a script that separates words."""
    if _category(character) not in "LN":
        return False
    return unicodedata.category(character) == "Nd" or not unicodedata.name(character, "").startswith(UNSEPARATED)


class Word:
    """A word or phrase, to be found as a whole: `in_(caseless(text))`.

    Where its edge is a letter or digit of a script that separates words, no other such may follow. Elsewhere (emoji, punctuation, markup,
    Chinese, Thai) it may stand inside a run. A combining mark belongs to the character before it everywhere. Underscores that join two
    letters are part of the word, those around one (markdown) are not.
    """

    def __init__(self, word: str):
        self.text = caseless(word)
        self.letter_first = is_letter(self.text[0])
        self.letter_last = is_letter(next(character for character in reversed(self.text) if not is_mark(character)))
        self.flag_first = _is_half_flag(self.text[0])

    def in_(self, text: str) -> bool:
        """Whether it stands in a text that is `caseless`."""
        start = text.find(self.text)
        while start >= 0:
            if self._whole(text, start, start + len(self.text)):
                return True
            start = text.find(self.text, start + 1)
        return False

    def _whole(self, text: str, start: int, end: int) -> bool:
        if end < len(text) and is_mark(text[end]):
            return False
        if self.letter_last:
            while end < len(text) and text[end] == "_":
                end += 1
            if end < len(text) and is_letter(text[end]):
                return False
        before = start
        if self.flag_first:  # a flag is two letters: it begins where whole flags have gone before
            while before and _is_half_flag(text[before - 1]):
                before -= 1
            return (start - before) % 2 == 0
        if self.letter_first:
            while before and text[before - 1] == "_":
                before -= 1
            while before and is_mark(text[before - 1]):
                before -= 1
            return not (before and is_letter(text[before - 1]))
        return True


def _is_half_flag(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
