"""The next token has the probability that the logits give it, in every block of the vocabulary."""

import math

import pytest
import torch

from l3ms.rollouts.drawing import BLOCK, Drawn, draw


@pytest.mark.parametrize("size", [5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])
def test_frequencies_are_the_softmax(size):
    draws = 40 * size
    torch.manual_seed(size)
    logits = torch.randn(1, size)
    logits[0, [2, size - 2]] = -math.inf
    counts = torch.bincount(draw(logits.expand(draws, size)), minlength=size).double()
    expected = draws * logits[0].double().softmax(-1)
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = float(((counts - expected).square() / expected)[possible].sum())
    k = int(possible.sum()) - 1
    assert statistic < k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3  # its 99.9% quantile


@pytest.mark.parametrize("where", [0, BLOCK - 1, BLOCK, 599])
def test_a_certain_token_is_drawn(where):
    logits = torch.full((50, 600), -math.inf)
    logits[:, where] = 3.0
    assert (draw(logits) == where).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_possible_tokens(monkeypatch, uniform):
    """0 draws no token of probability 0, and the largest number below 1 none behind the last possible one."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, uniform, dtype=torch.float64))
    torch.manual_seed(1)
    logits = torch.randn(64, 600)
    logits[:, :3] = logits[:, -2:] = -math.inf
    assert (draw(logits) == (3 if uniform == 0.0 else 597)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_distribution_is_an_error(value):
    logits = torch.zeros(3, 300)
    logits[1, 280] = value
    with pytest.raises(RuntimeError, match="not finite"):
        draw(logits)


def test_the_drawn_token_is_the_largest_of_what_is_left():
    torch.manual_seed(0)
    scores = torch.randn(4, 17)
    torch.manual_seed(5)
    wanted = draw(scores / 0.7)
    torch.manual_seed(5)
    assert torch.equal(Drawn(0.7)(None, scores).argmax(-1), wanted)
