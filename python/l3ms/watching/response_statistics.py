"""What a batch of responses looks like, beside its rewards: the signs by which a hacked reward is known.

Distinct-n is the number of different n-grams over that of all n-grams of the batch (Li et al. 2016, arXiv 1510.03055), over tokens.
"""

import math
from collections.abc import Sequence

import torch

from l3ms.rollouts.rollout import Rollout


def response_tokens(rollout: Rollout) -> list[tuple[list[int], bool]]:
    """Tokens of each response and whether it ended with EOS, on the host: one wait for the device."""
    labels, ended = rollout.labels.cpu(), rollout.ended.tolist()
    return [(row[row != -100].tolist(), end) for row, end in zip(labels, ended, strict=True)]


def response_statistics(
    responses: Sequence[tuple[Sequence[int], bool]], floor: float | None = None
) -> dict[str, float]:
    """Of n >= 1 responses (tokens, ended): shares `ended`, `truncated`, `duplicates` (of responses that another one repeats, the first
    excluded), `distinct_1`, `distinct_2`, and `length/p5`, `/p50`, `/p95`, `/spread` = p95 - p5 in tokens; `length/humps`, see `humps`, and
    with a `floor` in tokens `length/short`, the share of responses below it. A ratio of nothing is left out.
    """
    count = len(responses)
    lengths = torch.tensor([len(tokens) for tokens, _ in responses], dtype=torch.float64)
    p5, p50, p95 = lengths.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    ended = sum(end for _, end in responses) / count
    values = {
        "ended": ended,
        "truncated": 1 - ended,
        "length/p5": p5,
        "length/p50": p50,
        "length/p95": p95,
        "length/spread": p95 - p5,
        "length/humps": humps(lengths.tolist()),
        "length/short": math.nan if floor is None else float((lengths < floor).double().mean()),
        "duplicates": 1 - len({tuple(tokens) for tokens, _ in responses}) / count,
        "distinct_1": distinct([tokens for tokens, _ in responses], 1),
        "distinct_2": distinct([tokens for tokens, _ in responses], 2),
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}


def humps(lengths: Sequence[float]) -> float:
    """How far the lengths are two groups instead of one: the share of their variance that is between the groups, for the best cut.

    A group has a fifth of the responses at least, and their means are at least 3/4 of the mean of all apart; 0 where no cut gives such
    groups. 0.64 for a bell, 0.75 for equally spread lengths, 1 for two lengths and nothing between (Otsu 1979).
    """
    ordered = sorted(lengths)
    count, total = len(ordered), math.fsum(ordered)
    mean = total / count
    variance = math.fsum((x - mean) ** 2 for x in ordered) / count
    best, below = 0.0, 0.0
    for cut in range(1, count):
        below += ordered[cut - 1]
        low, high, share = below / cut, (total - below) / (count - cut), cut / count
        if min(share, 1 - share) >= 0.2 and high - low >= 0.75 * mean and ordered[cut] > ordered[cut - 1]:
            best = max(best, share * (1 - share) * (high - low) ** 2 / variance)
    return best


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams; NaN where there is none."""
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
