"""Confidence bounds cover what they say (seeded simulations), verdicts follow from them, and odd samples satisfy nothing."""

import math
from typing import Any

import numpy as np
import pytest

import l3ms
from l3ms.measuring.evaluation import ratio
from l3ms.verdicts.certificate_table import remarks
from l3ms.verdicts.certificates import FEW, confidence_bounds, judge, together
from l3ms.verdicts.declaring import Declared, declare, known_range

EXACT = Declared("exact", (0.0, 1.0), "")
UNIT = Declared("bernstein", (0.0, 1.0), "")
T = Declared("t", None, "")
REPETITIONS, DELTA = 2000, 0.05
# A miss rate of exactly DELTA is above this in one of 700 simulations
MOST_MISSES = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / REPETITIONS)


def misses(draw, mean, declared, delta=DELTA, groups=None):
    """(share of lower bounds above the mean, of upper bounds below it)"""
    generator = np.random.default_rng(0)
    found = np.array([confidence_bounds(draw(generator), delta, declared, groups) for _ in range(REPETITIONS)])
    return float((found[:, 0] > mean).mean()), float((found[:, 1] < mean).mean())


def geometric(generator, n=1600):
    """Lengths: a geometric distribution cut at 60, so skewed that t wants many of them."""
    return np.minimum(generator.geometric(0.05, n), 60).astype(float)


GEOMETRIC_MEAN = sum(0.95 ** (k - 1) for k in range(1, 61))
SIMULATIONS = {
    "exact, rare": (lambda g: (g.random(80) < 0.02).astype(float), 0.02, EXACT),
    "exact, half": (lambda g: (g.random(50) < 0.5).astype(float), 0.5, EXACT),
    "exact, frequent": (lambda g: (g.random(200) < 0.97).astype(float), 0.97, EXACT),
    "bernstein, uniform": (lambda g: g.random(60), 0.5, UNIT),
    "bernstein, rare spikes": (lambda g: (g.random(100) < 0.01).astype(float), 0.01, UNIT),
    "t, normal": (lambda g: g.normal(3.0, 2.0, 8), 3.0, T),
    "t, lengths": (geometric, GEOMETRIC_MEAN, T),
    "bernstein, lengths": (geometric, GEOMETRIC_MEAN, Declared("bernstein", (1.0, 60.0), "")),
}


@pytest.mark.parametrize("name", SIMULATIONS)
def test_bounds_miss_the_mean_no_more_often_than_they_say(name):
    draw, mean, declared = SIMULATIONS[name]
    assert max(misses(draw, mean, declared)) <= MOST_MISSES


def test_simulations_catch_a_wrong_bound():
    """Twice the error, the normal instead of t, a forgotten logarithm: all of them would be seen."""
    draw, mean, declared = SIMULATIONS["t, normal"]
    assert max(misses(draw, mean, declared, delta=2 * DELTA)) > MOST_MISSES

    def normal(generator):
        x = draw(generator)
        return x.mean() - 1.645 * x.std(ddof=1) / math.sqrt(len(x)) > mean

    generator = np.random.default_rng(0)
    assert np.mean([normal(generator) for _ in range(REPETITIONS)]) > MOST_MISSES
    spikes = lambda g: (g.random(100) < 0.03).astype(float)  # noqa: E731
    assert max(misses(spikes, 0.03, T)) > MOST_MISSES  # t on values that are far from normal: why ranges are asked for


def test_t_and_exact_are_not_wasteful():
    low, high = misses(*SIMULATIONS["t, normal"])
    assert min(low, high) >= DELTA - 3 * math.sqrt(DELTA * (1 - DELTA) / REPETITIONS)
    assert min(misses(*SIMULATIONS["exact, frequent"])) > 0.005


def clustered(generator, prompts=40, each=5):
    """Responses to one prompt differ little; prompts differ much."""
    return (generator.random(prompts)[:, None] * np.ones(each)).ravel()


@pytest.mark.parametrize("declared", [T, UNIT])
def test_samples_of_one_prompt_are_counted_once(declared):
    groups = [n // 5 for n in range(200)]
    assert max(misses(clustered, 0.5, declared, groups=groups)) <= MOST_MISSES
    generator = np.random.default_rng(1)
    values = clustered(generator).tolist()
    assert confidence_bounds(values, DELTA, declared, groups) == pytest.approx(
        confidence_bounds(values[::5], DELTA, declared)
    )


def test_independence_is_not_assumed_by_mistake():
    assert max(misses(clustered, 0.5, T)) > MOST_MISSES


@pytest.mark.parametrize("declared", [T, UNIT])
def test_groups_of_unequal_size(declared):
    groups = [0] * 6 + [1] * 3 + list(range(2, 60))
    sizes = np.bincount(groups)
    assert max(misses(lambda g: np.repeat(g.random(len(sizes)), sizes), 0.5, declared, groups=groups)) <= MOST_MISSES


def test_a_ratio_of_means_is_covered_though_its_denominator_is_sampled():
    """Nats per token of what differs at the opening of a response, however long it is."""
    repetitions, n = 500, 800
    generator = np.random.default_rng(0)
    divergence = generator.normal(3.0, 1.5, (repetitions, n))
    lengths = np.minimum(generator.geometric(0.05, (repetitions, n)), 60)
    true = 3.0 / GEOMETRIC_MEAN
    linearised: Any = [ratio(*pair) for pair in zip(divergence.tolist(), lengths.tolist(), strict=True)]
    divided = divergence / lengths.mean(1, keepdims=True)
    assert np.allclose(np.mean(linearised, 1), divided.mean(1))
    wrong = []
    for samples in (linearised, divided):
        found = np.array([confidence_bounds(values, DELTA, T) for values in samples])
        wrong.append(max((found[:, 0] > true).mean(), (found[:, 1] < true).mean()))
    assert wrong[0] <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / repetitions)
    assert wrong[1] > 3 * DELTA


def test_empirical_bernstein_by_hand():
    values = [0.0, 1.0, 0.5, 0.25]
    half = math.sqrt(2 * np.var(values, ddof=1) * math.log(2 / 0.1) / 4) + 7 * 10 * math.log(2 / 0.1) / (3 * 3)
    wide = Declared("bernstein", (-5.0, 5.0), "")
    assert confidence_bounds(values, 0.1, wide) == pytest.approx((-5.0, 5.0))  # never outside of the range
    far = Declared("bernstein", (0.0, 1.0), "")
    values = [0.4, 0.6] * 200
    half = math.sqrt(2 * np.var(values, ddof=1) * math.log(2 / 0.1) / 400) + 7 * math.log(2 / 0.1) / (3 * 399)
    assert confidence_bounds(values, 0.1, far) == pytest.approx((0.5 - half, 0.5 + half))


def test_students_t_by_hand():
    """Of three values there are two degrees of freedom, and the 95% quantile is 2.9200."""
    half = 2.919986 / math.sqrt(3)
    assert confidence_bounds([1.0, 2.0, 3.0], 0.05, T) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_clopper_pearson_as_tabulated():
    """Two-sided 95% intervals that the literature prints: 10 of 20, 0 of 10, 10 of 10."""
    for hits, n, expected in ((10, 20, (0.2720, 0.7280)), (0, 10, (0.0, 0.3085)), (10, 10, (0.6915, 1.0))):
        assert confidence_bounds([1.0] * hits + [0.0] * (n - hits), 0.025, EXACT) == pytest.approx(expected, abs=5e-5)


# ---- verdicts ----


def verdict(values, low=None, high=None, declared=T, delta=0.025, groups=None):
    return judge(l3ms.Constraint("r", min=low, max=high), values, delta, declared, groups)


def spread(mean, deviation, n):
    """n values of exactly this mean and sample deviation."""
    x = np.resize([-1.0, 1.0], n)
    return list(mean + deviation * x * math.sqrt((n - 1) / n))


def test_three_words():
    values = spread(10.0, 2.0, 400)  # 10 +- 0.2
    for bounds, word in (
        ({"low": 9.5}, "SATISFIED"), ({"high": 10.5}, "SATISFIED"), ({"low": 9.5, "high": 10.5}, "SATISFIED"),
        ({"low": 10.5}, "VIOLATED"), ({"high": 9.5}, "VIOLATED"), ({"low": 9.9}, "INCONCLUSIVE"),
        ({"low": 10.1}, "INCONCLUSIVE"), ({"low": 9.5, "high": 10.1}, "INCONCLUSIVE"),
        ({"low": 10.5, "high": 10.6}, "VIOLATED"),
    ):  # fmt: skip
        assert verdict(values, **bounds).verdict == word, bounds  # pyright: ignore[reportArgumentType]
    assert together(["SATISFIED", "INCONCLUSIVE", "VIOLATED"]) == "VIOLATED"
    assert together(["SATISFIED", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert together([]) == "INCONCLUSIVE"


def test_a_bound_at_the_end_of_the_range_is_held():
    """The confidence bound is then the end itself, and a bound is met at its edge."""
    for constraint in (l3ms.Constraint("r", min=0.0), l3ms.Constraint("r", max=1.0)):
        assert judge(constraint, [0.0, 1.0] * 10, 0.05, UNIT).verdict == "SATISFIED"


def test_sides_are_told_apart():
    found = verdict(spread(10.0, 2.0, 400), low=9.5, high=9.6)
    assert [(side.side, side.verdict) for side in found.bounds] == [("min", "SATISFIED"), ("max", "VIOLATED")]


def test_wrong_verdicts_are_rare_and_right_ones_frequent():
    generator = np.random.default_rng(3)
    broken = [verdict(generator.normal(9.999, 2.0, 100), low=10.0, delta=DELTA).verdict for _ in range(REPETITIONS)]
    assert broken.count("SATISFIED") / REPETITIONS <= MOST_MISSES
    held = [verdict(generator.normal(10.001, 2.0, 100), low=10.0, delta=DELTA).verdict for _ in range(REPETITIONS)]
    assert held.count("VIOLATED") / REPETITIONS <= MOST_MISSES
    clear = [verdict(generator.normal(10.7, 2.0, 100), low=10.0, delta=DELTA).verdict for _ in range(REPETITIONS)]
    assert clear.count("SATISFIED") / REPETITIONS > 0.95


@pytest.mark.parametrize("declared", [T, Declared("bernstein", (0.0, 20.0), "")])
def test_so_many_more_samples_would_do(declared):
    values = spread(10.0, 2.0, 100)
    more = verdict(values, low=9.8, declared=declared).bounds[0].more
    assert more is not None
    more += more % 2
    assert verdict(spread(10.0, 2.0, 100 + more), low=9.8, declared=declared).verdict == "SATISFIED"
    assert verdict(spread(10.0, 2.0, 100 + 2 * int(0.47 * more)), low=9.8, declared=declared).verdict == "INCONCLUSIVE"
    if declared is T:
        assert 100 + more == pytest.approx((1.96 * 2 / 0.2) ** 2, rel=0.03)


@pytest.mark.parametrize(("used_up", "unit"), [(False, "more samples"), (True, "more different prompts")])
def test_where_no_prompt_is_left_more_samples_of_the_same_are_not_advised(used_up, unit):
    found = verdict(spread(10.0, 2.0, 100), low=9.9)
    assert found.verdict == "INCONCLUSIVE"
    assert any(line.endswith(unit) for line in remarks(found, used_up=used_up))


def test_more_samples_of_an_indicator():
    more = verdict([1.0] * 45 + [0.0] * 5, low=0.85, declared=EXACT).bounds[0].more
    assert more is not None
    n = 50 + more
    assert (
        verdict([1.0] * round(0.9 * n) + [0.0] * (n - round(0.9 * n)), low=0.85, declared=EXACT).verdict == "SATISFIED"
    )


def test_at_the_bound_no_number_of_samples_helps():
    assert verdict(spread(10.0, 2.0, 100), low=10.0).bounds[0].more is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_rule_satisfied_out(bad):
    values = [*spread(10.0, 0.1, 400), bad]
    found = verdict(values, low=9.0)
    assert (found.verdict, found.nonfinite, found.samples) == ("INCONCLUSIVE", 1, 400)
    assert "1 values are NaN or infinite" in found.notes[0]
    assert verdict(values, low=11.0).verdict == "VIOLATED"
    assert verdict([bad] * 5, low=9.0).verdict == "INCONCLUSIVE"


def test_missing_values_are_left_out_and_said():
    found = verdict([*spread(10.0, 0.1, 100), None, None], low=9.0)
    assert (found.verdict, found.missing, found.samples) == ("SATISFIED", 2, 100)
    assert "2 samples have no value" in found.notes[0]
    assert verdict([None, None], low=9.0).verdict == verdict([], low=9.0).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("declared", [T, UNIT, EXACT])
def test_one_sample_satisfies_nothing(declared):
    assert verdict([1.0], low=0.1, declared=declared).verdict == "INCONCLUSIVE"


def test_few_samples_are_said_to_be_few():
    assert "approximation" in verdict(spread(10.0, 0.1, FEW - 1), low=9.0).notes[0]
    assert not verdict(spread(10.0, 0.1, FEW), low=9.0).notes


def test_equal_values_are_no_certainty():
    """Student's t would have no width at all. What was not seen may still be."""
    found = verdict([12.0] * 500, low=11.0, high=13.0)
    assert (found.verdict, found.lower, found.upper) == ("INCONCLUSIVE", -math.inf, math.inf)
    assert "declare its range" in found.notes[0]
    lengths = Declared("t", (1.0, 100.0), "")
    found = verdict([12.0] * 500, low=11.0, high=13.0, declared=lengths)
    unseen = 1 - 0.025 ** (1 / 500)
    assert (found.lower, found.upper) == pytest.approx((12 - 11 * unseen, 12 + 88 * unseen))
    assert found.verdict == "SATISFIED"
    assert verdict([12.0] * 20, low=11.0, high=13.0, declared=lengths).verdict == "INCONCLUSIVE"
    assert (
        misses(lambda g: np.where(g.random(20) < 0.02, 100.0, 1.0), 2.98, lengths)[1] < 1
    )  # some samples are all equal


def test_values_outside_of_the_declared_range():
    with pytest.raises(ValueError, match=r"constraint 'r': the value 1\.5 is outside of the declared range \[0, 1\]"):
        verdict([0.5, 1.5], low=0.1, declared=UNIT)
    with pytest.raises(ValueError, match="values of 0 and 1 alone"):
        verdict([0.5, 1.0], low=0.1, declared=EXACT)
    with pytest.raises(ValueError, match="independent"):
        verdict([1.0, 1.0], low=0.1, declared=EXACT, groups=[0, 0])
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        confidence_bounds([1.0, 2.0], 0.0, T)


# ---- what is declared before sampling ----


def test_known_ranges():
    def coin(prompts, completions, **columns):
        return [0.0]

    coin.binary = True  # type: ignore[attr-defined]

    def tanh(prompts, completions, **columns):
        return [0.0]

    tanh.reward_range = (-1, 1)  # type: ignore[attr-defined]
    assert known_range(l3ms.Length(max=9), 64) == ((1.0, 64.0), False)
    assert known_range(l3ms.Constraint("c", coin, min=0.5), 64) == ((0.0, 1.0), True)
    assert known_range(l3ms.Constraint("c", tanh, min=0.5), 64) == ((-1.0, 1.0), False)
    assert known_range(l3ms.Constraint("c", min=0.5), 64) == (None, False)
    assert known_range(l3ms.Constraint("c", min=0.5), 64, (0.0, 3.0)) == ((0.0, 3.0), False)


def test_auto_takes_the_method_by_what_is_known_before():
    chance, length = l3ms.Constraint("c", min=0.9), l3ms.Length(min=40, max=50)
    options = {"known": (0.0, 1.0), "indicator": True}
    assert declare(chance, 500, 0.025, **options).method == "exact"
    assert declare(chance, 500, 0.025, **options, grouped=True).method == "bernstein"
    assert declare(chance, 500, 0.025, known=None).method == "t"
    assert declare(length, 500, 0.025, known=(1.0, 100.0)).method == "t"
    assert declare(length, 5000, 0.025, known=(1.0, 100.0)).method == "bernstein"
    assert declare(length, 1, 0.025, known=(1.0, 100.0)).method == "t"
    assert declare(length, 500, 0.025, known=(1.0, 100.0), method="bernstein").method == "bernstein"
    assert declare(chance, 500, 0.025, **options, method="t").method == "t"
    with pytest.raises(ValueError, match="--range c=LOW,HIGH"):
        declare(chance, 500, 0.025, known=None, method="bernstein")
    with pytest.raises(ValueError, match="auto, bernstein or t"):
        declare(chance, 500, 0.025, known=None, method="bootstrap")


SHARES = [l3ms.Length(min=4, quantile=0.05), l3ms.Constraint("r", lambda **_: [], threshold=2.0, min=0.9)]


@pytest.mark.parametrize("share", SHARES, ids=["quantile", "threshold"])
def test_a_share_is_declared_as_one_whatever_is_said_of_it(share):
    for options in ({}, {"known": (0.0, 1.0)}, {"known": (0.0, 1.0), "indicator": True}):
        assert declare(share, 64, 0.05, **{"known": None, **options}) == Declared(
            "exact", (0.0, 1.0), "values are 0 or 1"
        )
    assert declare(share, 64, 0.05, known=None, grouped=True).range == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"bounds a share, whose values are 0 and 1: leave out known=\(1.0, 64.0\)"):
        declare(share, 64, 0.05, known=(1.0, 64.0))


@pytest.mark.parametrize("share", SHARES, ids=["quantile", "threshold"])
def test_a_share_is_judged_by_zeros_and_ones_alone(share):
    """Lengths of 1 to 3 are all above a share of 0.95."""
    lengths = [1.0, 3.0, None, math.nan] * 32
    for declared in (T, declare(share, 128, 0.05, known=None)):
        with pytest.raises(ValueError, match=r"bounds a share, of values 0 and 1, got 3: give constraint.indicator\("):
            judge(share, lengths, 0.05, declared)
        assert judge(share, share.indicator(lengths), 0.05, declared).missing == 32
    assert judge(share, [True] * 200, 0.05, declared).verdict == "SATISFIED"


def test_ranges_that_would_not_be_used_are_refused():
    def coin(**columns):
        return []

    coin.binary = True  # type: ignore[attr-defined]
    for known in (*SHARES, l3ms.Constraint("c", coin, min=0.5)):
        with pytest.raises(ValueError, match="are 0 and 1, which is known; leave it out"):
            known_range(known, 64, (0.0, 3.0))
    with pytest.raises(ValueError, match="ratio of means"):
        known_range(l3ms.KL(max=1.0, per_token=True), 64, (0.0, 3.0))
