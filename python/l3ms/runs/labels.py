"""What models, solvers and bounds are called, in tables and in pictures alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l3ms.constraints.shares import bounds_of, event_of, quantile_text

MODELS = ("sft", "initial", "last", "average")  # keys of a report, in the order in which they are shown


def model_label(key: str, report: Mapping[str, Any] | None = None) -> str:
    """How a model of a report is called in tables and pictures."""
    solver = solver_label(report)
    return {"sft": "SFT", "initial": "before", "last": f"{solver} last", "average": f"{solver} averaged"}[key]


def solver_label(report: Mapping[str, Any] | None = None) -> str:
    """SFT, L3M, or the name of the solver that the barrier is compared with."""
    solver = (report or {}).get("solver") or "barrier"
    return {"none": "SFT", "barrier": "L3M"}.get(solver, solver.replace("_", " "))


def constraint_label(item: Mapping[str, Any]) -> str:
    """What is estimated: the mean of `polite`, or the share `P(polite >= 0.5)` of responses that a threshold or a quantile is about."""
    event = event_of(item)
    return item["name"] if event is None else event.text(item["name"])


def wanted_text(item: Mapping[str, Any]) -> str:
    """The bounds on what is estimated: `in [12, 16]`, or `>= 0.95 (5% quantile >= 4)`; empty without bounds."""
    quantile = quantile_text(item)
    return bounds_text(*bounds_of(item)) + (f" ({quantile})" if quantile else "")


def bounds_text(minimum: float | None, maximum: float | None) -> str:
    """`in [12, 16]`, `>= 12` or `<= 16`; empty without bounds."""
    if minimum is not None and maximum is not None:
        return f"in [{minimum:g}, {maximum:g}]"
    if minimum is not None:
        return f">= {minimum:g}"
    return f"<= {maximum:g}" if maximum is not None else ""


def is_mean_length(item: Mapping[str, Any]) -> bool:
    """Whether a constraint is on the mean response length in tokens; `item` as in a report, one of the demo's without a type."""
    kind = item.get("type") or ("length" if item["name"] == "length" else None)
    return kind == "length" and event_of(item) is None
