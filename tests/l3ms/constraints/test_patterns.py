"""Regular expressions under a time limit: `re`'s own answers, and an error where it takes too long."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ms
from l3ms.constraints import patterns

FOREVER = r"(a+)+$"
TRAP = "a" * 40 + "b"


def test_a_pattern_that_takes_forever_is_an_error_that_names_constraint_row_and_pattern(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.7)
    constraint = l3ms.Constraint("form", l3ms.rewards.matches(FOREVER), min=0.5)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"constraint 'form': matches: row 1: the regular expression '\(a\+\)\+\$' took"
    ) as error:
        constraint.rewards(["p"] * 2, ["aaa", TRAP], [1] * 2)
    assert time.monotonic() - start < 10
    assert "more than 2 s (this text has 41 characters)" in str(error.value)


def test_the_limit_grows_with_the_texts(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    assert patterns.found(FOREVER, ["aaa"] * 30, full=False) == [True] * 30


def test_no_text_needs_no_answer():
    assert patterns.found(FOREVER, [], full=False) == []


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.sampled_from([r"\w+", r"\s", r"^[a-f]*$", r"(?is)x.*y", r"(.)\1", r"\frac{d}", "[\u00e9\U0001f525]", r"\ud800"]),
    st.lists(
        st.text(st.characters(), max_size=6) | st.sampled_from(["rac{d}", "\ud800", "ÉX\ny", "\x1c", "é²"]), max_size=6
    ),
    st.booleans(),
)
def test_answers_are_those_of_re(pattern, texts, full):
    find = re.compile(pattern).fullmatch if full else re.compile(pattern).search
    assert patterns.found(pattern, texts, full=full) == [find(text) is not None for text in texts]
