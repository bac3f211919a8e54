"""What a user may write as a constraint, and what a reward function may return."""

import math

import pytest

import l3ms
from l3ms.constraints.constraint import check_constraints


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "min, max or both"),
        ({"min": 2.0, "max": 1.0}, "min 2 > max 1"),
        ({"min": math.nan}, "min must be a finite"),
        ({"max": math.inf}, "max must be a finite"),
        ({"max": 1.0, "scale": 0.0}, "scale must be positive"),
        ({"max": 1.0, "scale": -1.0}, "scale must be positive"),
        ({"max": 1.0, "scale": math.nan}, "scale must be a finite"),
        ({"max": 1.0, "margin": -0.1}, "margin must be >= 0"),
        ({"min": 0.0, "max": 1.0, "margin": 0.5}, "margin must be >= 0 and less than half"),
        ({"max": 1.0, "margin": math.inf}, "margin must be a finite"),
    ],
)
def test_a_bad_constraint_is_refused_with_its_name(options, named):
    with pytest.raises(ValueError, match="constraint 'polite'") as error:
        l3ms.Constraint("polite", **options)
    assert named in str(error.value)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_name_that_would_break_the_metrics_is_refused(name):
    with pytest.raises(ValueError, match="name must be a non-empty text without '/'"):
        l3ms.Constraint(name, max=1.0)


def test_names_are_unique_and_items_are_constraints():
    with pytest.raises(ValueError, match="'length' is used twice"):
        check_constraints([l3ms.Length(max=3), l3ms.Length(min=1)])
    with pytest.raises(ValueError, match=r"l3ms\.Constraint objects, got str"):
        check_constraints(["length"])  # type: ignore[list-item]
    assert check_constraints([]) == ()


@pytest.mark.parametrize(
    ("bounds", "unit"),
    [
        ({"min": 50, "max": 100}, 75.0),  # the middle of the range
        ({"max": 40}, 40.0),
        ({"min": -40}, 40.0),
        ({"min": 0.2}, 1.0),
        ({"min": -1, "max": 1}, 1.0),  # no middle: half the width
        ({"min": 0, "max": 0}, 1.0),
        ({"min": 50, "max": 100, "scale": 3.0}, 3.0),
    ],
)
def test_default_scale(bounds, unit):
    assert l3ms.Constraint("r", **bounds).unit == unit


def test_rows_are_lower_bound_first_with_the_default_margin_of_two_standard_errors():
    assert l3ms.Constraint("r", min=2, max=6).rows(3) == [
        (3, -1.0, 2.0, 4.0, 0.0, 2.0, 1.0),
        (3, 1.0, 6.0, 4.0, 0.0, 2.0, 1.0),
    ]
    assert l3ms.Constraint("r", max=6, margin=0.5).rows(0) == [(0, 1.0, 6.0, 6.0, 0.5, 0.0, math.inf)]
    assert l3ms.Constraint("r", min=6).rows(0) == [(0, -1.0, 6.0, 6.0, 0.0, 2.0, math.inf)]


def test_a_reward_function_of_trl_is_called_unchanged():
    seen = {}

    def count_vowels(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [1, 2.5, None]

    rewards = l3ms.Constraint("vowels", count_vowels, min=1).rewards(["p"] * 3, ["x", "y", "z"], [1, 1, 1], topic=[4])
    assert rewards == [1.0, 2.5, None]
    assert seen == {"prompts": ["p"] * 3, "completions": ["x", "y", "z"], "topic": [4]}


def bad_reward(values):
    def graded(prompts, completions, **columns):
        return values

    return l3ms.Constraint("polite", graded, min=0.5)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([1.0, math.nan], "row 1 is nan"),
        ([math.inf, 1.0], "row 0 is inf"),
        ([1.0], "wanted 2, got 1"),
        ([1.0, 2.0, 3.0], "wanted 2, got 3"),
        ([1.0, "good"], "row 1 is 'good'"),
        (3.0, "list of 2 numbers, got float"),
        (None, "list of 2 numbers, got NoneType"),
    ],
)
def test_a_wrong_reward_names_constraint_function_and_row(values, named):
    with pytest.raises(ValueError, match="constraint 'polite': graded") as error:
        bad_reward(values).rewards(["p", "p"], ["x", "y"], [1, 1])
    assert named in str(error.value)


def test_values_let_what_is_not_finite_through():
    values = bad_reward([1, None, -math.inf, math.nan]).values(["p"] * 4, ["x"] * 4, [1] * 4)
    assert values[:3] == [1.0, None, -math.inf]
    assert str(values[3]) == "nan"
    with pytest.raises(ValueError, match="constraint 'polite': graded must return one number per response"):
        bad_reward([1.0]).values(["p"] * 4, ["x"] * 4, [1] * 4)


def test_a_callable_object_is_named_by_its_class():
    class Judge:
        def __call__(self, prompts, completions):
            return [math.nan]

    with pytest.raises(ValueError, match="constraint 'judge': Judge: row 0 is nan"):
        l3ms.Constraint("judge", Judge(), max=1).rewards(["p"], ["x"], [1])


def test_length_needs_no_function_and_others_do():
    length = l3ms.Length(min=2, max=4)
    assert length.name == "length"
    assert length.samples
    assert length.rewards(["p"] * 2, ["x", "y"], [3, 7]) == [3.0, 7.0]
    assert not l3ms.Constraint("nll", max=2).samples
    with pytest.raises(ValueError, match="'nll' has no function"):
        l3ms.Constraint("nll", max=2).rewards(["p"], ["x"], [1])
    with pytest.raises(ValueError, match="min 5 > max 4"):
        l3ms.Length(min=5, max=4)


# ---- chance constraints ----


def scored(prompts, completions, **columns):
    return [0.0, 1.0, 2.5, None, math.nan, math.inf][: len(completions)]


def test_a_threshold_makes_the_reward_an_indicator():
    chance = l3ms.Constraint("safe", scored, min=0.9, threshold=1.0)
    assert chance.rewards(["p"] * 4, ["x"] * 4, [1] * 4) == [0.0, 1.0, 1.0, None]
    assert chance.values(["p"] * 3, ["x"] * 3, [1] * 3) == [0.0, 1.0, 2.5]
    kept = chance.indicator(chance.values(["p"] * 6, ["x"] * 6, [1] * 6))
    assert kept[:4] == [0.0, 1.0, 1.0, None]
    assert str(kept[4]) == "nan"  # for `observe` to decide about
    assert kept[5] == math.inf
    assert l3ms.Length(max=0.1, threshold=5).rewards(["p"] * 3, ["x"] * 3, [4, 5, 6]) == [0.0, 1.0, 1.0]


def test_the_scale_of_a_probability_is_one():
    assert l3ms.Constraint("safe", scored, min=0.2, max=0.4, threshold=1.0).unit == 1.0
    assert l3ms.Length(max=0.1, threshold=5).unit == 1.0
    assert l3ms.Constraint("safe", scored, min=0.2, threshold=1.0, scale=0.5).unit == 0.5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min": 1.1, "threshold": 0.0}, "min must be in [0, 1], since with a threshold it is a probability, got 1.1"),
        (
            {"max": -0.1, "threshold": 0.0},
            "max must be in [0, 1], since with a threshold it is a probability, got -0.1",
        ),
        ({"min": 0.5, "threshold": math.nan}, "threshold must be a finite number"),
        ({"min": "0.8"}, "min must be a finite number, got '0.8'"),
        ({"min": 0.5, "threshold": 1.0, "function": None}, "threshold needs a function"),
    ],
)
def test_a_bad_chance_constraint_is_named(options, named):
    with pytest.raises(ValueError, match="constraint 'safe'") as error:
        l3ms.Constraint("safe", **{"function": scored, **options})
    assert named in str(error.value)
