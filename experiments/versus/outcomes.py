"""What the cells have come to, and what each contestant has paid for a certificate."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    ratio: float | None = None  # task perplexity over the reference's of the same seed

    @property
    def certified(self) -> bool:
        return self.judged["verdict"] == "SATISFIED"


@dataclass(frozen=True)
class Cost:
    """Of some tries."""

    tries: int = 0
    training_tokens: int = 0
    judging_tokens: int = 0
    seconds: float = 0.0  # of training and judging

    def with_try(self, result: Result) -> Cost:
        return Cost(
            self.tries + 1,
            self.training_tokens + result.trained["sampled_tokens"],
            self.judging_tokens + result.judged["sampled_tokens"],
            self.seconds + result.trained["seconds"] + result.judged["seconds"],
        )


@dataclass(frozen=True)
class Outcome:
    """A contestant on one seed: its tries in the order of the grid."""

    contestant: str
    seed: int
    certified: bool
    to_certificate: Cost  # the tries up to the first that is certified; all of them where none is
    all_tries: Cost
    first_ratio: float | None  # task perplexity of the first certified try, over the reference's
    best_ratio: float | None  # the least of the certified tries
    best: str | None  # which try that is


def read_results(cells: Sequence[Cell], folder: Path, reference: str) -> list[Result]:
    """Of the cells that have finished."""
    found = []
    for cell in cells:
        if is_finished(cell, folder):
            place = cell_folder(folder, cell)
            trained, judged = (json.loads((place / name).read_text(encoding="utf-8")) for name in (TRAINED, RESULT))
            found.append(Result(cell.contestant, cell.attempt, cell.seed, cell.values["setting"], trained, judged))
    base = {item.seed: item.judged["perplexity"] for item in found if item.contestant == reference}
    return [_with_ratio(item, base.get(item.seed)) for item in found]


def outcomes(cells: Sequence[Cell], results: Sequence[Result]) -> list[Outcome]:
    """Of each contestant and seed whose tries have all finished. Of what it goes on from the training counts, once."""
    by_key = {f"{item.contestant}/{item.attempt}/seed-{item.seed}": item for item in results}
    tries: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        tries.setdefault((cell.contestant, cell.seed), []).append(cell)
    found = []
    for (name, seed), own in tries.items():
        if all(cell.key in by_key and (cell.after is None or cell.after in by_key) for cell in own):
            before = sum(
                by_key[key].trained["seconds"] for key in {cell.after for cell in own if cell.after is not None}
            )
            found.append(_outcome(name, seed, [by_key[cell.key] for cell in own], before))
    return found


def _outcome(name: str, seed: int, tries: Sequence[Result], seconds_before: float) -> Outcome:
    certified = [item for item in tries if item.certified]
    cost = Cost(seconds=seconds_before)
    to_certificate = None
    for item in tries:
        cost = cost.with_try(item)
        if item.certified and to_certificate is None:
            to_certificate = cost
    best = min(certified, key=lambda item: item.judged["perplexity"] or math.inf, default=None)
    return Outcome(
        name, seed, bool(certified), to_certificate or cost, cost,
        certified[0].ratio if certified else None, best.ratio if best else None, best.attempt if best else None,
    )  # fmt: skip


def write_results(results: Sequence[Result], found: Sequence[Outcome], facts: Mapping[str, Any], path: Path) -> None:
    values = {**facts, "contestants": [asdict(item) for item in found], "cells": [asdict(item) for item in results]}
    path.write_text(f"{json.dumps(values, indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def _with_ratio(result: Result, base: float | None) -> Result:
    perplexity = result.judged["perplexity"]
    ratio = None if base is None or perplexity is None else perplexity / base
    return Result(**{**vars(result), "ratio": ratio})
