"""The tables: what each contestant paid for its certificate, then every try."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.presenting import machine_letters, markdown, number
from experiments.versus.contest import Cell, Contest
from experiments.versus.outcomes import Cost, Outcome, Result


def table(contest: Contest, cells: Sequence[Cell], results: Sequence[Result], found: Sequence[Outcome]) -> str:
    task, judge = cells[0].values["task"], contest.judge
    reference = contest.contestants[contest.reference].title
    lines = [
        f"# {contest.title}",
        "",
        f"Wanted: a mean response length in [{task['min']:g}, {task['max']:g}] tokens, certified on {judge.samples} fresh responses to",
        f"held-out prompts, at the least task perplexity. {task['iterations']} iterations each, of {task['batch_size']} task rows and",
        f"{task['responses']} responses.",
        "",
        "## What a certificate costs",
        "",
        _contestants(contest, found, results, cells[0].seed),
        f"Tuned with seed {cells[0].seed}: tries in the order of the grid, up to the first that is certified, or all of them. Tokens are",
        "response tokens, drawn in training + for the verdicts; core-minutes are of both. Perplexity is that of held-out completions,",
        f"over that of {reference} with the same seed: of the first certified try, and the least of the certified tries. What is of all",
        "tries stands where all have been run. The best try (certified at the least perplexity, else nearest to the range) is run again",
        "with other seeds, and has one verdict there.",
        "",
        "## Every try",
        "",
        _tries(contest, task, results),
        "Lengths with their confidence bounds: all verdicts on a contestant and seed hold together with probability",
        f"{1 - judge.delta:g}, so the more tries, the wider they are. Where a mean is in the range, `responses it takes` are how many a",
        "certificate of it takes, by its distance from the bounds and by the spread of the responses. Core-minutes of different",
        "machines are not the same thing: "
        + ", ".join(f"{letter} is {place}" for place, letter in _machines(results).items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _contestants(contest: Contest, found: Sequence[Outcome], results: Sequence[Result], seed: int) -> str:
    header = (
        "contestant", "certified", "tries", "of", "tokens, k", "core-minutes", "perplexity / SFT's", "least",
        "all tries: tokens, k", "core-minutes", "its best try again: certified", "perplexity / SFT's",
    )  # fmt: skip
    rows = []
    for name, entrant in contest.contestants.items():
        again = [item for item in results if item.contestant == name and item.seed != seed]
        for item in found:
            if (item.contestant, item.seed) == (name, seed):
                to, whole = item.to_certificate, [item.all_tries] if item.all_tries else []
                rows.append((
                    entrant.title, "yes" if item.certified else "no", str(to.tries), str(len(entrant.tries)), _tokens([to]),
                    _mean([to], _minutes, ".1f"), _ratio([item.first_ratio]), _ratio([item.best_ratio]),
                    _tokens(whole), _mean(whole, _minutes, ".1f"),
                    f"{sum(run.certified for run in again)} of {len(again)}" if again else "-", _ratio([run.ratio for run in again]),
                ))  # fmt: skip
    return markdown(header, rows)


def _tries(contest: Contest, task: Mapping[str, Any], results: Sequence[Result]) -> str:
    header = (
        "contestant", "try", "mean length (bounds), by seed", "verdict", "responses it takes", "perplexity", "/ SFT's",
        "under 4 tokens", "cut", "tokens, k", "core-minutes", "machine",
    )  # fmt: skip
    rows, machines = [], _machines(results)
    for name, entrant in contest.contestants.items():
        for attempt in entrant.tries:
            own = [item for item in results if (item.contestant, item.attempt) == (name, attempt)]
            if own:
                costs = [Cost().with_try(item) for item in own]
                rows.append((
                    entrant.title, attempt, ", ".join(map(_length, own)), ", ".join(item.judged["verdict"] for item in own),
                    ", ".join(_taken(task, item) for item in own),
                    _average([item.judged["perplexity"] for item in own], ".2f"), _ratio([item.ratio for item in own]),
                    *(f"{100 * sum(item.judged[share] for item in own) / len(own):.0f}%" for share in ("few", "cut")),
                    _tokens(costs), _mean(costs, _minutes, ".1f"),
                    "".join(sorted({machines[place] for item in own for place in item.machines})),
                ))  # fmt: skip
    return markdown(header, rows)


def _machines(results: Sequence[Result]) -> dict[str, str]:
    return machine_letters(place for item in results for place in item.machines)


def _length(result: Result) -> str:
    judged = result.judged
    return f"{judged['length']['mean']:.1f} ({judged['lower']:.1f} to {judged['upper']:.1f})"


def _taken(task: Mapping[str, Any], result: Result) -> str:
    """Responses that a certificate of this mean and spread takes; "-" where the mean is outside."""
    judged = result.judged
    if not task["min"] <= judged["length"]["mean"] <= task["max"]:
        return "-"
    more = max(bound["more"] or 0 for bound in judged["certificate"]["bounds"])
    return f"{judged['samples'] + more:,}"


def _minutes(cost: Cost) -> float:
    return cost.seconds / 60


def _tokens(costs: Sequence[Cost]) -> str:
    """`6.1 + 7.2`: drawn in training + for the verdicts."""
    if not costs:
        return "-"
    training, judging = (
        sum(getattr(cost, f"{part}_tokens") for cost in costs) / len(costs) / 1000 for part in ("training", "judging")
    )
    return f"{training:.1f} + {judging:.1f}"


def _mean(costs: Sequence[Cost], value: Callable[[Cost], float], form: str) -> str:
    return format(sum(map(value, costs)) / len(costs), form) if costs else "-"


def _average(values: Sequence[float | None], form: str) -> str:
    given = [value for value in values if value is not None]
    return number(math.fsum(given) / len(given) if given else None, form)


def _ratio(values: Sequence[float | None]) -> str:
    return _average(values, ".3f")
