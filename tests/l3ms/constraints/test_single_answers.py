"""What a bound on the mean length leaves open, and which bounds beside it close that."""

import pytest
import yaml
from pydantic import TypeAdapter

import l3ms
from l3ms.config.constraints import ConstraintConfig
from l3ms.constraints.rewards import ends_with_eos
from l3ms.constraints.single_answers import SingleAnswers, bounds_to_add, is_mean_length, open_sides, short_below

MEAN = l3ms.Length(min=12, max=16)


def test_shares_of_single_answers():
    found = SingleAnswers.of(MEAN, [2, 2, 3, 64], ended=0.75)
    assert found == pytest.approx((2.4, 0.5, 0.25))
    assert found.text(64) == "50% are below 2.4 tokens, a fifth of the bound, and 25% are cut at 64"
    assert short_below(l3ms.Length(max=40)) == 8


def test_a_mean_length_is_none_of_a_share_or_a_monitor():
    others = [l3ms.Length(threshold=4, min=0.9), l3ms.Length(min=4, quantile=0.1), l3ms.Length(monitor=True)]
    assert is_mean_length(MEAN)
    assert not any(map(is_mean_length, [*others, l3ms.Constraint("length", min=3)]))


@pytest.mark.parametrize(
    ("beside", "left"),
    [
        (None, (True, True)),
        (l3ms.Length(min=4, quantile=0.05, name="a"), (False, True)),
        (l3ms.Length(threshold=4, min=0.95, name="a"), (False, True)),
        (l3ms.Length(max=40, quantile=0.95, name="a"), (True, False)),
        (l3ms.Length(threshold=40, max=0.05, name="a"), (True, False)),
        (l3ms.Constraint("ended", ends_with_eos, min=0.95), (True, False)),
        (l3ms.Constraint("ended", ends_with_eos, monitor=True), (True, True)),
        (l3ms.Length(threshold=4, monitor=True, name="a"), (True, True)),
    ],
)
def test_a_bound_on_a_share_closes_its_side(beside, left):
    assert open_sides(MEAN, [MEAN] if beside is None else [MEAN, beside]) == left


def test_nobody_asked_for_long_answers():
    assert open_sides(l3ms.Length(max=16), []) == (False, True)
    assert open_sides(l3ms.Length(min=5), []) == (False, True)  # a response has 1 token at least


def test_the_yaml_to_add_bounds_what_is_open():
    added = yaml.safe_load(f"[{bounds_to_add(MEAN, short=True, cut=True)}]")
    assert added[0] == {"type": "length", "name": "not-short", "quantile": 0.05, "min": 3}
    for item in added:
        TypeAdapter(ConstraintConfig).validate_python(item)
    lengths = [2, 3]
    assert l3ms.Length(min=3, quantile=0.05).rewards(["", ""], ["", ""], lengths) == [0, 1]
    assert [length < short_below(MEAN) for length in lengths] == [True, False]
