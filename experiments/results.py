"""What the cells have come to, read from their files alone: report.json, metrics.jsonl, certificate.json; or from what was published."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.cells import CERTIFICATE, MACHINE, cell_folder, is_trained, run_folder
from experiments.grid import Cell
from l3ms.config.train import TrainConfig
from l3ms.constraints.shares import bounds_of
from l3ms.runs.report import read_metrics

WEIGHTS = "average"  # the model that is reported and certified: the weights averaged over the last part of the run


@dataclass(frozen=True)
class Result:
    """One cell of one seed. `summary` is the report's, of fresh samples on held-out prompts (`l3ms.runs.report`)."""

    name: str
    labels: tuple[str, ...]
    seed: int
    solver: str
    bounds: list[dict[str, Any]]  # {"name", "min", "max", "threshold", "quantile"}
    summary: dict[str, Any]
    last: dict[str, Any]  # the same of the last iterate, without averaging
    initial: dict[str, Any]  # the same before training; empty where `evaluate.initial` is false
    iterations: int
    seconds: float
    multipliers: dict[str, float]  # "length_max" -> lambda at the end
    mu: float | None
    verdicts: dict[str, str]  # constraint -> SATISFIED, VIOLATED, INCONCLUSIVE
    certificate: dict[str, Any] | None
    ratio: float | None = None  # task perplexity over the reference's of the same seed
    responses: int = 0  # sampled in an iteration, of the constraints
    machine: str = ""  # that it ran on
    identity: str = ""  # the cell's
    examples: list[dict[str, str]] = field(default_factory=list, repr=False)  # {"prompt", "average", "initial"?}
    metrics: list[dict[str, Any]] = field(default_factory=list, repr=False)  # the iterations

    @property
    def minutes(self) -> float:
        """Of the training, its samples at the end and the certificate."""
        return (self.seconds + float((self.certificate or {}).get("seconds") or 0.0)) / 60

    def bound(self, name: str = "length") -> tuple[float | None, float | None]:
        found = next((item for item in self.bounds if item["name"] == name), {})
        return bounds_of(found)

    @property
    def key(self) -> str:
        return f"{self.name}/seed-{self.seed}"

    @property
    def before(self) -> Result:
        """The same run before its training."""
        return replace(self, summary=self.initial)

    @property
    def sampled_tokens(self) -> float | None:
        """Of all responses that the training sampled; None where neither the run nor a constraint or monitor `length` has counted them."""
        if self.solver == "none":
            return 0.0
        if self.metrics and (counted := self.metrics[-1].get("l3m/sampled_tokens")) is not None:
            return counted
        means = [mean for row in self.metrics if (mean := row.get("constraints/length/batch_mean")) is not None]
        return self.responses * math.fsum(means) if means and len(means) == len(self.metrics) else None

    def measured(self, name: str) -> tuple[float, float, float]:
        """(mean, low, high) of a constraint (or of "length") on fresh held-out samples, 95%; NaN where not measured."""
        rewards = self.summary.get("constraints") or {}
        value = rewards.get(name) or (self.summary.get("length") if name == "length" else None) or {}
        if value.get("mean") is None or not value.get("ci95"):
            return math.nan, math.nan, math.nan
        return value["mean"], *value["ci95"]


def read_results(
    cells: Sequence[Cell], folder: Path, reference: str | None = None, published: Mapping[str, Result] | None = None
) -> list[Result]:
    """Of the cells that have finished training in `folder`, and of the others those that are published."""
    known = published or {}
    found = [_read(cell, folder) if is_trained(cell, folder) else known.get(cell.key) for cell in cells]
    results = [result for result in found if result is not None]
    base = {result.seed: result.summary.get("perplexity") for result in results if result.name == reference}
    return [_with_ratio(result, base.get(result.seed)) for result in results]


def _read(cell: Cell, folder: Path) -> Result:
    run = run_folder(folder, cell)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    metrics = read_metrics(run / "metrics.jsonl")
    place = cell_folder(folder, cell) / MACHINE
    certificate = None
    if cell.certify is not None and (run / CERTIFICATE).exists():
        certificate = json.loads((run / CERTIFICATE).read_text(encoding="utf-8"))
    return Result(
        name=cell.name,
        labels=cell.labels,
        seed=cell.seed,
        solver=report["solver"],
        bounds=report["constraints"],
        summary=report[WEIGHTS],
        last=report["last"],
        initial=report.get("initial") or {},
        iterations=report["iterations"],
        seconds=report["seconds"],
        multipliers=_multipliers(metrics),
        mu=report.get("mu_end"),
        verdicts=_verdicts(certificate),
        certificate=certificate,
        machine=place.read_text(encoding="utf-8").strip() if place.exists() else "",
        identity=cell.identity,
        responses=(cell.config.get("train") or {}).get("constraint_batch_size", TrainConfig().constraint_batch_size),
        examples=report.get("examples") or [],
        metrics=metrics,
    )


def _with_ratio(result: Result, base: float | None) -> Result:
    perplexity = result.summary.get("perplexity")
    return result if base is None or perplexity is None else replace(result, ratio=perplexity / base)


def _multipliers(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last value of each `constraints/NAME/lambda[_min|_max]`."""
    last: dict[str, float] = {}
    for row in metrics:
        for key, value in row.items():
            name, _, what = key.removeprefix("constraints/").rpartition("/")
            if key.startswith("constraints/") and what.startswith("lambda") and value is not None:
                last[name + what.removeprefix("lambda")] = value
    return last


def _verdicts(certificate: dict[str, Any] | None) -> dict[str, str]:
    constraints = (certificate or {}).get("constraints") or []
    return {item["name"]: item["verdict"] for item in constraints if item["verdict"] is not None}


def failed_lines(cells: Sequence[Cell], results: Sequence[Result], errors: Mapping[str, str]) -> list[str]:
    """A line per cell that has no result, for the table: where the method or the machine failed, it says so."""
    there = {result.key for result in results}
    missing = [cell for cell in cells if cell.key not in there]
    return [f"* `{cell.key}` has no result: {errors.get(cell.key, 'not run')}" for cell in missing] + [
        f"* `{cell.key}` is not certified: {errors[cell.key]}"
        for cell in cells
        if cell.key in errors and cell not in missing
    ]
