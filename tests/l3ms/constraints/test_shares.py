"""A bound on a quantile is a bound on a share: which one, ties and all, against numpy's quantiles."""

import math

import numpy as np
import pytest

import l3ms
from l3ms.constraints.shares import bounds_of, event_of, quantile_text, sample_quantile

VALUES = np.random.default_rng(0)
SAMPLES = {
    "tokens": VALUES.integers(1, 9, 64).astype(float),  # many ties, at the bounds as well
    "halves": VALUES.integers(2, 16, 40) / 2,
    "scores": VALUES.normal(4.0, 2.0, 50),
    "one": np.array([4.0]),
    "two lengths": np.array([2.0] * 16 + [8.0] * 16),
}


def same(prompts, completions, **columns):
    return [float(text) for text in completions]


def bounded(quantile, **bound):
    return l3ms.Constraint("r", same, quantile=quantile, **bound)


def share(constraint, values):
    return np.mean(constraint.rewards([""] * len(values), [repr(float(v)) for v in values], [1] * len(values)))


@pytest.mark.parametrize(
    "quantile", [0.05, 0.125, 0.25, 0.5, 0.75, 0.875, 0.95]
)  # eighths of 64 and 40 are reached exactly
@pytest.mark.parametrize("values", SAMPLES.values(), ids=list(SAMPLES))
def test_the_share_is_met_where_numpys_quantile_is(values, quantile):
    upper = -np.quantile(-values, 1 - quantile, method="inverted_cdf")  # the largest of the quantiles
    lower = np.quantile(values, quantile, method="inverted_cdf")  # and the smallest
    for bound in np.concatenate([np.unique(values), np.arange(0, 10, 0.25)]):
        least, most = bounded(quantile, min=bound), bounded(quantile, max=bound)
        assert (share(least, values) >= least.low) == (upper >= bound)
        assert (share(most, values) >= most.low) == (lower <= bound)


def test_values_at_the_bound_count_on_its_right_side():
    assert bounded(0.05, min=4).rewards([""] * 4, ["3", "3.999", "4", "5"], [1] * 4) == [0, 0, 1, 1]
    assert bounded(0.95, max=4).rewards([""] * 4, ["3", "4", "4.001", "5"], [1] * 4) == [1, 1, 0, 0]
    assert l3ms.Length(min=4, quantile=0.05).rewards([""] * 3, ["x"] * 3, [3, 4, 5]) == [0, 1, 1]
    values = bounded(0.95, max=4).indicator([None, math.nan, 4.0])
    assert values[0] is None
    assert math.isnan(values[1])  # type: ignore[arg-type]
    assert values[2] == 1


@pytest.mark.parametrize(
    ("options", "same_as"),
    [
        ({"min": 4, "quantile": 0.05}, {"min": 0.95, "threshold": 4}),
        ({"min": 4.5, "quantile": 0.5}, {"min": 0.5, "threshold": 4.5}),
        ({"max": 40, "quantile": 0.95}, {"max": 1 - 0.95, "threshold": math.nextafter(40, math.inf)}),
    ],
)
def test_it_is_the_share_that_could_be_written_by_hand(options, same_as):
    one, other = l3ms.Length(**options), l3ms.Length(**same_as)
    lengths = [1, 4, 5, 39, 40, 41]
    mine, theirs = (c.rewards([""] * 6, [""] * 6, lengths) for c in (one, other))
    mirrored = one.max is not None  # P(r <= 40) >= 0.95 is P(r > 40) <= 0.05
    assert mine == ([float(value == 0) for value in theirs] if mirrored else theirs)
    (row,), (expected,) = one.rows(0), other.rows(0)
    if mirrored:
        assert (row[1], expected[1]) == (-1, 1)
        assert row[2] == pytest.approx(1 - expected[2], abs=1e-15)
    else:
        assert row[:3] == expected[:3]
    assert row[3:] == expected[3:]
    assert (one.unit, one.width) == (1, math.inf)


@pytest.mark.parametrize("values", SAMPLES.values(), ids=list(SAMPLES))
@pytest.mark.parametrize("quantile", [0.05, 0.07, 0.25, 0.5, 0.93, 0.95])
def test_the_quantile_that_is_shown_agrees_with_the_share(values, quantile):
    for side in ("min", "max"):
        found = sample_quantile(values.tolist(), {side: 0.0, "quantile": quantile})
        at, beyond = bounded(quantile, **{side: found}), math.nextafter(found, math.inf if side == "min" else -math.inf)
        assert share(at, values) >= at.low
        assert share(bounded(quantile, **{side: beyond}), values) < at.low


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min": 4, "quantile": 5}, "quantile must be between 0 and 1 (0.05 is the 5% quantile), got 5"),
        ({"min": 4, "quantile": 0.0}, "quantile must be between 0 and 1"),
        ({"min": 4, "quantile": 1.0}, "quantile must be between 0 and 1"),
        ({"min": 4, "quantile": math.nan}, "quantile must be a finite number"),
        ({"min": 0.5, "quantile": 0.05, "threshold": 4}, "quantile and threshold are two ways to bound a share"),
        ({"min": 4, "max": 40, "quantile": 0.5}, "quantile takes min or max, not both"),
        ({"quantile": 0.5}, "give min, max or both"),
        ({"quantile": 0.5, "monitor": True}, "quantile is for a constraint"),
        ({"min": 4, "quantile": 0.05, "function": None}, "quantile needs a function"),
        ({"min": 4, "quantile": 0.05, "margin": 0.05}, "margin must leave room for a share"),
        ({"threshold": 4, "min": 0.98, "margin": 0.02}, "margin must leave room for a share"),
        ({"threshold": 4, "max": 0.02, "margin": 0.02}, "margin must leave room for a share"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, named):
    with pytest.raises(ValueError, match="constraint 'r': ") as error:
        l3ms.Constraint("r", **{"function": same, **options})
    assert named in str(error.value)


def test_a_margin_with_room_is_kept():
    (row,) = l3ms.Length(min=4, quantile=0.05, margin=0.01).rows(0)
    assert row[4:] == (0.01, 0.0, math.inf)


def test_every_kind_that_samples_takes_a_quantile():
    kl = l3ms.KL(max=10, quantile=0.9)
    model = l3ms.RewardModel("safe", "nowhere", min=0.3, quantile=0.1)
    assert (kl.low, model.low) == (0.9, 0.9)
    with pytest.raises(TypeError, match="quantile"):
        l3ms.DataNLL("old", [], max=1.0, quantile=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("share", [{"threshold": 0.1}, {"quantile": 0.1}])
def test_a_divergence_per_token_has_no_share(share):
    with pytest.raises(ValueError, match="constraint 'kl': per_token is for a mean"):
        l3ms.KL(max=0.5, per_token=True, **share)


def test_the_words():
    item = {"min": 4.0, "max": None, "quantile": 0.07, "threshold": None}
    event = event_of(item)
    assert event is not None
    assert (event.text("brief"), quantile_text(item)) == ("P(brief >= 4)", "7% quantile >= 4")
    assert bounds_of({"min": 1, "max": 2}) == (1, 2)
    assert event_of({"min": 1, "max": 2}) is None
