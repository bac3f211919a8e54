"""Statistics of a batch of responses, against counts made by hand."""

import math

import pytest
import torch

from l3ms.rollouts.rollout import Rollout
from l3ms.watching.response_statistics import distinct, response_statistics, response_tokens

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
