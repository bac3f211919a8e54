"""What the cells have come to, and what each contestant has paid for a certificate."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.versus.cell import RESULT, TRAINED
from experiments.versus.contest import Cell
from experiments.versus.running import cell_folder, is_finished


@dataclass(frozen=True)
class Result:
    """One cell."""

    contestant: str
    attempt: str
    seed: int
    setting: Mapping[str, Any]
    trained: dict[str, Any] = field(repr=False)
    judged: dict[str, Any] = field(repr=False)
    ratio: float | None = None  # task perplexity over the reference's of the same seed and training rows

    @property
    def certified(self) -> bool:
        return self.judged["verdict"] == "SATISFIED"

    @property
    def machines(self) -> set[str]:
        """That it was trained and judged on."""
        return {self.trained["machine"], self.judged["machine"]}


@dataclass(frozen=True)
class Cost:
    """Of some tries."""

    tries: int = 0
    training_tokens: int = 0
    judging_tokens: int = 0
    seconds: float = 0.0  # of training and judging, of all cores together

    def with_try(self, result: Result) -> Cost:
        return Cost(
            self.tries + 1,
            self.training_tokens + result.trained["sampled_tokens"],
            self.judging_tokens + result.judged["sampled_tokens"],
            self.seconds + result.trained["seconds"] + result.judged["seconds"],
        )


@dataclass(frozen=True)
class Outcome:
    """A contestant on one seed: its tries there, in the order of the grid."""

    contestant: str
    seed: int
    certified: bool
    to_certificate: Cost  # the tries up to the first that is certified; all of them where none is
    first_ratio: float | None  # task perplexity of the first certified try, over the reference's
    all_tries: Cost | None = None  # where all have finished
    best_ratio: float | None = None  # the least of all certified tries
    best: str | None = None  # which try that is


def read_results(cells: Sequence[Cell], folder: Path, reference: str) -> list[Result]:
    """Of the cells that have finished."""
    found = []
    for cell in cells:
        if is_finished(cell, folder):
            place = cell_folder(folder, cell)
            trained, judged = (json.loads((place / name).read_text(encoding="utf-8")) for name in (TRAINED, RESULT))
            found.append(Result(cell.contestant, cell.attempt, cell.seed, cell.values["setting"], trained, judged))
    base = {_paired(item): item.judged["perplexity"] for item in found if item.contestant == reference}
    return [_with_ratio(item, base.get(_paired(item))) for item in found]


def _paired(result: Result) -> tuple[int, str | None]:
    """What has to be equal of a result and its reference: rows mined on machines with other packages are others."""
    return result.seed, result.trained.get("rows")


def outcomes(cells: Sequence[Cell], results: Sequence[Result]) -> list[Outcome]:
    """Of each contestant and seed that is certified or has finished all tries. Of what it goes on from the training counts, once."""
    by_key = {f"{item.contestant}/{item.attempt}/seed-{item.seed}": item for item in results}
    tries: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        tries.setdefault((cell.contestant, cell.seed), []).append(cell)
    found = []
    for (name, seed), own in tries.items():
        before = {cell.after for cell in own if cell.after is not None}
        if before <= by_key.keys():
            seconds = sum(by_key[key].trained["seconds"] for key in before)
            outcome = _outcome(name, seed, [by_key.get(cell.key) for cell in own], seconds)
            found += [] if outcome is None else [outcome]
    return found


def tuned(cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, str]:
    """By contestant the try to go on with: the certified one of the least perplexity, else the one whose mean is nearest to the range.

    Of those whose tries have all finished, or were ended by a certificate.
    """
    bounds = {cell.contestant: (cell.values["task"]["min"], cell.values["task"]["max"]) for cell in cells}
    known = {item.contestant for item in outcomes(cells, results)}

    def order(item: Result) -> tuple[bool, float, float]:
        low, high = bounds[item.contestant]
        mean = item.judged["length"]["mean"]
        distance = 0.0 if item.certified else max(low - mean, mean - high, 0.0)
        return not item.certified, distance, item.judged["perplexity"] or math.inf

    return {
        name: min((item for item in results if item.contestant == name), key=order).attempt
        for name in bounds
        if name in known
    }


def _outcome(name: str, seed: int, tries: Sequence[Result | None], seconds_before: float) -> Outcome | None:
    """None where it is not known yet what a certificate costs."""
    to_certificate = Cost(seconds=seconds_before)
    winner = None
    for item in tries:
        if item is None:
            return None
        to_certificate = to_certificate.with_try(item)
        if item.certified:
            winner = item
            break
    outcome = Outcome(name, seed, winner is not None, to_certificate, winner.ratio if winner else None)
    finished = [item for item in tries if item is not None]
    if len(finished) < len(tries):
        return outcome
    cost = Cost(seconds=seconds_before)
    for item in finished:
        cost = cost.with_try(item)
    certified = [item for item in finished if item.certified]
    best = min(certified, key=lambda item: item.judged["perplexity"] or math.inf, default=None)
    return replace(
        outcome, all_tries=cost, best_ratio=best.ratio if best else None, best=best.attempt if best else None
    )


def write_results(results: Sequence[Result], found: Sequence[Outcome], facts: Mapping[str, Any], path: Path) -> None:
    values = {**facts, "contestants": [asdict(item) for item in found], "cells": [asdict(item) for item in results]}
    path.write_text(f"{json.dumps(values, indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def _with_ratio(result: Result, base: float | None) -> Result:
    perplexity = result.judged["perplexity"]
    ratio = None if base is None or perplexity is None else perplexity / base
    return replace(result, ratio=ratio)
