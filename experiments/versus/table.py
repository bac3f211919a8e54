"""The tables: what each contestant paid for its certificate, then every try."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from experiments.presenting import markdown, number
from experiments.versus.contest import Cell, Contest
from experiments.versus.outcomes import Cost, Outcome, Result


def table(contest: Contest, cells: Sequence[Cell], results: Sequence[Result], found: Sequence[Outcome]) -> str:
    samples = contest.judge.samples
    bounds = next(cell.values["task"] for cell in cells)
    low, high = bounds["min"], bounds["max"]
    return "\n".join([
        f"# {contest.title}",
        "",
        f"Wanted: a mean response length in [{low:g}, {high:g}] tokens, certified on {samples} fresh responses to held-out prompts, at the least",
        f"task perplexity. {bounds['iterations']} iterations each, of {bounds['batch_size']} task rows and {bounds['responses']} responses.",
        "",
        "## What a certificate costs",
        "",
        _contestants(contest, found),
        "Tries in the order of the grid, up to the first that is certified; of a seed that never is, all of them. Tokens are response tokens drawn in",
        "training + for the verdicts; minutes are of both. Perplexity is of held-out completions, over that of "
        f"{contest.contestants[contest.reference].title}",
        "of the same seed: of the first certified try, and of the certified try with the least.",
        "",
        "## Every try",
        "",
        _tries(contest, results),
        f"Lengths are means with their confidence bounds, verdicts hold together with probability {1 - contest.judge.delta:g} for each contestant and seed:",
        "the more tries, the wider the bounds of each.",
        "",
    ])  # fmt: skip


def _contestants(contest: Contest, found: Sequence[Outcome]) -> str:
    header = ("contestant", "seeds certified", "tries", "of", "tokens, k", "minutes", "perplexity / SFT's", "best of the grid", "all tries: tokens, k", "minutes")  # fmt: skip
    rows = []
    for name, entrant in contest.contestants.items():
        own = [item for item in found if item.contestant == name]
        if own:
            to, grid = [item.to_certificate for item in own], [item.all_tries for item in own]
            rows.append((
                entrant.title, f"{sum(item.certified for item in own)} of {len(own)}", _mean(to, lambda cost: cost.tries, ".1f"),
                str(len(entrant.tries)), _tokens(to), _mean(to, _minutes, ".1f"),
                _ratio([item.first_ratio for item in own]), _ratio([item.best_ratio for item in own]),
                _tokens(grid), _mean(grid, _minutes, ".1f"),
            ))  # fmt: skip
    return markdown(header, rows)


def _tries(contest: Contest, results: Sequence[Result]) -> str:
    header = ("contestant", "try", "mean length (bounds), seed by seed", "verdict", "perplexity", "/ SFT's", "under 4 tokens", "cut", "tokens, k", "minutes")  # fmt: skip
    rows = []
    for name, entrant in contest.contestants.items():
        for attempt in entrant.tries:
            own = [item for item in results if (item.contestant, item.attempt) == (name, attempt)]
            if own:
                costs = [Cost().with_try(item) for item in own]
                rows.append((
                    entrant.title, attempt, ", ".join(map(_length, own)), ", ".join(item.judged["verdict"] for item in own),
                    _average([item.judged["perplexity"] for item in own], ".2f"), _ratio([item.ratio for item in own]),
                    *(f"{100 * sum(item.judged[share] for item in own) / len(own):.0f}%" for share in ("few", "cut")),
                    _tokens(costs), _mean(costs, _minutes, ".1f"),
                ))  # fmt: skip
    return markdown(header, rows)


def _length(result: Result) -> str:
    judged = result.judged
    return f"{judged['length']['mean']:.1f} ({judged['lower']:.1f} to {judged['upper']:.1f})"


def _minutes(cost: Cost) -> float:
    return cost.seconds / 60


def _tokens(costs: Sequence[Cost]) -> str:
    """`6.1 + 7.2`: drawn in training + for the verdicts."""
    training, judging = (
        sum(getattr(cost, f"{part}_tokens") for cost in costs) / len(costs) / 1000 for part in ("training", "judging")
    )
    return f"{training:.1f} + {judging:.1f}"


def _mean(costs: Sequence[Cost], value: Callable[[Cost], float], form: str) -> str:
    return format(sum(map(value, costs)) / len(costs), form)


def _average(values: Sequence[float | None], form: str) -> str:
    given = [value for value in values if value is not None]
    return number(math.fsum(given) / len(given) if given else None, form)


def _ratio(values: Sequence[float | None]) -> str:
    return _average(values, ".3f")
