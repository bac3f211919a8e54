"""Ready-made rewards: values worked out by hand, on text and on conversations, and through pickle."""

import pickle
from typing import get_args

import pytest

import l3ms
from l3ms.config.constraints import ReadyRewardConfig
from l3ms.constraints.rewards import READY, make, options_of

R = l3ms.rewards


def graded(reward, *texts, **columns):
    plain = reward(prompts=[""] * len(texts), completions=list(texts), **columns)
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(prompts=[""] * len(texts), completions=chat, **columns) == plain
    return plain


def test_parts_of_a_content_are_its_text():
    parts = [{"type": "text", "text": "a 1"}, {"type": "text", "text": "2"}]
    for content, found in ((parts, 1.0), (None, 0.0), ([], 0.0)):
        assert R.matches(r"^a 12$")([""], [[{"role": "assistant", "content": content}]]) == [found]
    with pytest.raises(ValueError, match="a part of type 'image': a language model reads"):
        R.contains(["a"])([""], [[{"role": "assistant", "content": [{"type": "image"}]}]])


def test_ends_with_eos():
    assert graded(R.ends_with_eos, "a", "b", ended=[True, False], number=[1, 2]) == [1.0, 0.0]


def test_matches():
    assert graded(R.matches(r"\d+"), "a 12", "12", "twelve") == [1.0, 1.0, 0.0]
    assert graded(R.matches(r"\d+", full=True), "a 12", "12", "12\n") == [0.0, 1.0, 0.0]
    assert graded(R.matches("(?is)^yes.*end$"), "YES\n...END") == [1.0]


def test_contains_and_avoids_count_whole_words_in_any_case():
    words = ["cat", "C++", "two words"]
    assert graded(R.contains(words), "Cat", "concatenate", "c++ and cat", "two words cat C++") == pytest.approx(
        [1 / 3, 0, 2 / 3, 1]
    )
    assert graded(R.avoids(words), "Cat.", "concatenate", "two  words", "") == [0.0, 1.0, 1.0, 1.0]


def test_ends_with():
    assert graded(R.ends_with("."), "Done.", "Done. \n", "Done", "", "Done.)") == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_readability_is_flesch_s_formula():
    # 6 words, 1 sentence, 6 syllables; 5 words in 2 sentences, 9 syllables (in-ter-na-tion-al has 5)
    assert graded(R.readability, "The cat sat on the mat.") == pytest.approx([206.835 - 1.015 * 6 - 84.6])
    assert graded(R.readability, "We like international. Good day!") == pytest.approx(
        [206.835 - 1.015 * 2.5 - 84.6 * 9 / 5]
    )
    assert graded(R.readability, "Go.") == pytest.approx([121.22])
    assert graded(R.readability, "", "12 + 3", "internationalization") == [None, None, 0.0]
    easy, hard = graded(
        R.readability, "I see a big red dog. It can run.", "Comprehensive organisational accountability matters."
    )
    assert easy is not None
    assert hard is not None
    assert easy > 90 > 30 > hard


def test_distinct_n():
    assert graded(R.distinct_n(1), "a b a b", "a", "") == [0.5, 1.0, 1.0]
    assert graded(R.distinct_n(2), "a b a b", "a b c", "a") == pytest.approx([2 / 3, 1.0, 1.0])
    ids = [[1, 1, 1, 1], [1, 2]]
    assert graded(R.distinct_n(2, unit="tokens"), "w", "x", completion_ids=ids) == pytest.approx([1 / 3, 1.0])


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("matches", {}, "pattern is required by matches"),
        ("matches", {"pattern": "["}, "pattern must be a regular expression, got '['"),
        ("matches", {"pattern": ""}, "pattern must be a text, not empty"),
        ("contains", {"words": "cat"}, "words must be a list of texts, got 'cat'"),
        ("contains", {"words": []}, "words must be texts, not empty"),
        ("avoids", {"words": ["a", 3]}, "words must be texts, not empty, got ['a', 3]"),
        ("ends_with", {"text": ""}, "text must be a text, not empty"),
        ("distinct_n", {"n": 0}, "n must be a positive integer, got 0"),
        ("distinct_n", {"n": True}, "n must be a positive integer, got True"),
        ("distinct_n", {"unit": "lines"}, "unit must be words or tokens, got 'lines'"),
        ("readability", {"n": 1}, "n is no option of readability; its options: none"),
    ],
)
def test_a_bad_option_is_named(name, options, named):
    with pytest.raises(ValueError, match=r".") as error:
        make(name, options)
    assert str(error.value).startswith(named)


def test_all_can_be_pickled_and_compared():
    made = [
        R.matches("a", full=True),
        R.contains(["a"]),
        R.avoids(["a"]),
        R.ends_with("a"),
        R.distinct_n(3),
        R.readability,
    ]
    for reward in made:
        again = pickle.loads(pickle.dumps(reward))
        assert again == reward
        assert again(["p"], ["a"]) == reward(["p"], ["a"])


def test_the_configuration_knows_every_reward_and_option():
    assert set(get_args(ReadyRewardConfig.model_fields["reward"].annotation)) == set(READY)
    options = {option for name in READY for option in options_of(name)}
    assert options <= set(ReadyRewardConfig.model_fields)
    for name in ("contains", "matches"):
        constraint = l3ms.Constraint(
            "x", make(name, {"words": ["a"]} if name == "contains" else {"pattern": "a"}), min=0.5
        )
        assert constraint.where == f"constraint 'x': {name}"
