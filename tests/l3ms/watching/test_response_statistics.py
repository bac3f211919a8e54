"""Statistics of a batch of responses, against counts made by hand."""

import math

import pytest
import torch

from l3ms.rollouts.rollout import Rollout
from l3ms.watching.response_statistics import distinct, humps, response_statistics, response_tokens

END = 1


def test_of_four_responses():
    responses = [([5, 6, END], True), ([5, 6, END], True), ([7, 7, 7, 7], False), ([END], True)]
    values = response_statistics(responses)
    assert values["ended"] == 0.75
    assert values["truncated"] == 0.25
    assert values["duplicates"] == 0.25  # one of four repeats another
    assert values["distinct_1"] == 4 / 11
    assert values["distinct_2"] == 3 / 7  # (5 6) (6 1) (7 7), of 2 + 2 + 3
    assert values["length/p50"] == 3
    assert values["length/spread"] == pytest.approx(values["length/p95"] - values["length/p5"])


def test_a_ratio_of_nothing_is_left_out():
    values = response_statistics([([END], True), ([END], True)])
    assert "distinct_2" not in values
    assert values["duplicates"] == 0.5
    assert math.isnan(distinct([[]], 1))


def test_tokens_are_those_of_the_responses_alone():
    labels = torch.tensor([[-100, -100, 4, END], [-100, 3, -100, -100]])
    ones = torch.ones_like(labels)
    made = Rollout(["", ""], ["", ""], ones, ones, labels, torch.tensor([2, 1]), torch.tensor([True, False]))
    assert response_tokens(made) == [([4, END], True), ([3], False)]


def test_humps_tell_two_groups_of_lengths_from_one():
    draw = torch.Generator().manual_seed(0)
    bell = (30 + 6 * torch.randn(400, generator=draw)).round().tolist()
    even = torch.randint(1, 65, (400,), generator=draw).tolist()
    tail = torch.empty(400).exponential_(1 / 36, generator=draw).ceil().clamp(1, 64).tolist()
    assert humps(bell) == 0
    assert 0.7 < humps(even) < 0.85
    assert 0.7 < humps(tail) < 0.9
    assert humps([2] * 45 + [64] * 55) == pytest.approx(1)
    near = [2 + n % 4 for n in range(45)] + [50 + n % 15 for n in range(55)]
    assert humps(near) > 0.95
    assert humps([5, 6] * 20) == 0, "two lengths that are one answer"
    assert humps([5] * 20) == 0
    assert humps([2] * 3 + [40] * 97) == 0, "a few outliers"


def test_short_responses_are_those_below_a_floor():
    responses = [([5] * n, True) for n in (1, 2, 8, 9)]
    assert response_statistics(responses, floor=2.0)["length/short"] == 0.25
    assert "length/short" not in response_statistics(responses)
