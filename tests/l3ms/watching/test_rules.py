"""Rules on statistics that are made up: what trips, what does not, and from when on."""

import pytest

import l3ms
from l3ms.config.watch import WatchConfig
from l3ms.watching.response_statistics import response_statistics
from l3ms.watching.rules import HeldOutWatch, RuleWatch, rules_of
from l3ms.watching.watch import short_floor

HEALTHY = {"ended": 0.9, "truncated": 0.1, "length/p50": 20.0, "length/spread": 15.0, "distinct_2": 0.8,
           "length/short": 0.1, "length/humps": 0.6}  # fmt: skip


def trips(*iterations, **options):
    """(iteration, rule) of everything beyond its limit."""
    watch = RuleWatch(WatchConfig(window=4, **options))
    return [(i, trip.rule) for i, values in enumerate(iterations, 1) for trip in watch.update({**HEALTHY, **values})]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"ended": 0.44}, "EOS rate fell"),
        ({"truncated": 0.51}, "truncated share"),
        ({"length/p50": 2.0}, "median length"),
        ({"length/spread": 0.0}, "spread of lengths"),
        ({"distinct_2": 0.39}, "distinct-2 fell"),
        ({"length/short": 0.36}, "share of short responses"),
        ({"length/humps": 0.91}, "two humps of lengths"),
    ],
)
def test_each_rule_trips_once_a_whole_window_is_beyond_its_limit(values, rule):
    found = trips(*[{}] * 6, *[values] * 4)
    assert (10, rule) in found
    assert {name for _, name in found} == {rule}
    assert trips(*[{}] * 6, values, *[{}] * 6) == [], "one noisy batch tripped"


def test_a_low_rate_trips_without_a_fall_from_the_start():
    start = {"ended": 0.15}
    assert trips(*[start] * 4, *[{"ended": 0.09}] * 4) == [(8, "EOS rate")]


def test_what_was_never_within_its_limit_does_not_trip_until_it_has_been():
    bad = {"truncated": 1.0, "ended": 0.0}
    assert trips(*[bad] * 20) == []
    found = trips(*[bad] * 6, *[{}] * 4, *[bad] * 4)
    assert found[-1][0] == 14
    assert {name for i, name in found if i > 10} == {"truncated share", "EOS rate"}


def test_null_turns_a_rule_off():
    off = ("ended_fall", "ended_min", "truncated_max", "median_length_min", "length_spread_min", "distinct_2_fall")
    off += ("short_max", "humps_max")
    assert len(rules_of(WatchConfig())) == len(off)
    assert rules_of(WatchConfig(**dict.fromkeys(off))) == []
    assert trips(*[{}] * 6, *[{"truncated": 1.0}] * 6, truncated_max=None) == []


def test_missing_statistics_are_waited_for():
    watch = RuleWatch(WatchConfig(window=2))
    assert watch.update({"ended": 1.0}) == watch.update({}) == watch.update({"ended": 1.0}) == []
    assert watch.start == {"ended": 1.0}


def test_after_forget_a_whole_window_is_needed_again_and_the_start_stays():
    watch = RuleWatch(WatchConfig(window=2))
    for _ in range(3):
        watch.update(HEALTHY)
    bad = {**HEALTHY, "ended": 0.2}
    watch.update(bad)
    assert watch.update(bad)
    watch.forget()
    assert not watch.update(bad)
    assert [trip.rule for trip in watch.update(bad)] == ["EOS rate fell"]


def test_held_out_gap_trips_twice_in_a_row():
    watch = HeldOutWatch(4.0)
    assert watch.update({"a": 5.0, "b": -9.0}) == []
    assert watch.update({"a": 3.9}) == []
    assert watch.update({"a": 5.0}) == []
    assert [tuple(trip) for trip in watch.update({"a": 6.0})] == [("held-out a", 6.0, 4.0)]
    assert HeldOutWatch(None).update({"a": 99.0}) == []


def test_a_mean_that_is_met_by_two_tokens_and_by_cuts_trips():
    """36 tokens on average, in [33, 40]: no other rule sees it."""
    floor = short_floor([l3ms.Constraint("other", max=1.0), l3ms.Length(min=33, max=40)], 0.2)
    assert floor == pytest.approx(6.6)
    watch = RuleWatch(WatchConfig(window=4))
    bell = [([0] * n, True) for n in range(30, 43)] * 2
    humped = [([n, 1], True) for n in range(12)] + [([5, *range(63)], n % 3 > 0) for n in range(14)]
    found = [watch.update(response_statistics(batch, floor)) for batch in [bell] * 4 + [humped] * 4]
    assert {trip.rule for trips in found for trip in trips} == {"share of short responses", "two humps of lengths"}
    assert short_floor([l3ms.Length(max=10)], 0.2) == 2
    assert short_floor([l3ms.Length(max=0.5, threshold=9), l3ms.Length(monitor=True)], 0.2) is None
