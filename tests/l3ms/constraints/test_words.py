"""Words by Unicode: examples of many scripts, and random texts against a plain reading of them, character by character."""

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ms

R = l3ms.rewards


def found(word, text):
    share, clean = R.contains([word])([""], [text])[0], R.avoids([word])([""], [text])[0]
    assert {share, clean} == {0.0, 1.0}
    return share == 1


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("🔥", "great🔥"),
        ("🔥", "🔥🔥so"),
        ("❤", "❤\ufe0f"),  # as a picture
        ("👍", "👍🏽"),
        ("🇺🇸", "a🇦🇺🇺🇸"),
        ("!!", "wow!!"),
        ("%", "5%"),
        ("://", "http://x"),
        ("</answer>", "42</answer>done"),
        ("C++", "C++20"),
        ("坏", "这是坏的"),
        ("だめ", "それはだめです"),
        ("กิน", "ผมกินข้าว"),
        ("고양이", "고양이가"),
        ("cat", "我喜欢cat这个词"),
        ("7", "第7章"),
        ("caf\u00e9", "cafe\u0301 noir"),
        ("cafe\u0301", "CAF\u00c9"),
        ("straße", "STRASSE!"),
        ("STRASSE", "die straße"),
        ("istanbul", "\u0130STANBUL"),
        ("\u0130stanbul", "ISTANBUL"),
        ("\u0131l\u0131k", "ILIK"),
        ("ΟΔΟΣ", "οδος"),
        ("don't", "I don\u2019t"),
        ("don\u2019t", "DON'T"),
        ("bad", "_bad_ and **bold**"),
        ("forbidden", "for\u00adbidden"),
        ("cat", "cat\u200d cat"),
        ("\u200ccat", "a cat"),
        ("a b", "(a b)"),
    ],
)
def test_a_word_that_stands_there_is_found(word, text):
    assert found(word, text)
    assert found(word, unicodedata.normalize("NFD", text))
    assert found(unicodedata.normalize("NFD", word), text)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("cat", "concatenate"),
        ("cat", "cat_food"),
        ("food", "cat__food"),
        ("7", "17"),
        ("๑", "๑๒"),  # 1, 12
        ("50%", "150%"),
        ("cafe", "caf\u00e9"),
        ("x", "x\u030c"),  # no composed form
        ("x\u030c", "x"),
        ("か", "が"),
        ("가", "각"),
        ("=", "≠"),
        ("ก", "กิน"),
        ("🇺🇸", "🇦🇺🇸🇪"),  # Australia, Sweden
        ("cat", "\uff43\uff41\uff54"),  # full width
        ("cat", "cat\u200ds"),
        ("a b", "a  b"),
    ],
)
def test_a_part_of_a_word_or_of_a_character_is_not(word, text):
    assert not found(word, text)
    assert not found(word, unicodedata.normalize("NFD", text))


@pytest.mark.parametrize("word", ["\u0301", "\u0301a", "\ufe0f", "\u00ad", "\u200d", "\u0e34"])
def test_a_word_that_cannot_stand_by_itself_is_refused(word):
    for make in (R.contains, R.avoids):
        with pytest.raises(ValueError, match=r"words must be texts (that can be seen|with a character to begin with)"):
            make(["fine", word])
    with pytest.raises(ValueError, match=r"text must be a text (that can be seen|with a character to begin with)"):
        R.ends_with(word)


@pytest.mark.parametrize(
    ("text", "response", "ends"),
    [
        ("END\n", "bye END\n", 1),
        ("END\n", "bye END\n \n", 1),
        ("END\n", "bye END", 0),
        ("END\n", "bye END \n", 0),
        ("</answer> ", "42</answer> ", 1),
        ("\n", "bye\n", 1),
        ("\n", "bye", 0),
        (" \n", "bye \n", 1),
        ("END", "bye END\n", 1),
        ("END", "bye end", 0),  # upper and lower case differ here
        ("caf\u00e9", "cafe\u0301", 1),
        ("cafe", "cafe\u0301", 0),
        ("❤", "❤\ufe0f", 1),
    ],
)
def test_ends_with(text, response, ends):
    assert R.ends_with(text)([""], [response]) == [ends]


# ---- random texts ----

BASES = "aB1_ß坏🔥!' "
CHARACTERS = st.sampled_from([*BASES, "a\u0301", "\u00e1", "x\u030c", "b", "\u2019"])
TEXTS = st.lists(CHARACTERS, max_size=12).map("".join)
WORDS = st.lists(CHARACTERS, min_size=1, max_size=3).map("".join)


def characters(text):
    """Each with its marks; as they count in any case."""
    units = re.findall("[^\u0300-\u036f][\u0300-\u036f]*", unicodedata.normalize("NFD", text.replace("\u2019", "'")))
    return [character for unit in units for character in (["s", "s"] if unit == "ß" else [unit.lower()])]


def letter(character):
    return character[0].isalnum() and character[0] != "坏"


def stands(word, text):
    w, t = characters(word), characters(text)

    def whole(start):
        before, behind = (
            "".join(c[0] for c in t[:start]).rstrip("_"),
            "".join(c[0] for c in t[start + len(w) :]).lstrip("_"),
        )
        return not (letter(w[0]) and before and letter(before[-1])) and not (
            letter(w[-1]) and behind and letter(behind[0])
        )

    return any(t[start : start + len(w)] == w and whole(start) for start in range(len(t)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(WORDS, TEXTS, TEXTS, st.booleans())
def test_words_are_found_where_a_plain_reading_finds_them(word, before, behind, put):
    text = before + (word if put else "") + behind
    assert found(word, text) == stands(word, text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(min_size=1, max_size=6), st.text(max_size=6), st.text(max_size=6))
def test_avoids_is_never_clean_where_the_word_stands_between_spaces(word, before, behind):
    try:
        reward = R.avoids([word])
    except ValueError:
        return
    assert reward([""], [f"{before} {word} {behind}"]) == [0.0]
    assert reward([""], [f"{before}\n{unicodedata.normalize('NFD', word)}. {behind}"]) == [0.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(min_size=1, max_size=5), st.text(alphabet=" \n\t", max_size=3), st.text(max_size=5))
def test_what_ends_with_a_text_does_and_more_white_space_may_follow(text, space, before):
    try:
        reward = R.ends_with(text)
    except ValueError:
        return
    assert reward([""], [f"{before} {text}{space}"]) == [1.0]
