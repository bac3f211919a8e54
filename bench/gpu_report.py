"""What a run of `gpu_run.py` says at its end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    name: str
    status: str  # "done", or what became of it
    seconds: float = 0.0
    good: bool = True
    instead: str = ""
    at: dict[str, Any] | None = None  # the last thing that it said it was at


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line for each part that was timed."""
    lines = []
    for record in (record for record in records if "group" in record):
        line = f"{record['group']}: {record['title']}  {record.get('reason') or ''}"
        if record.get("seconds"):
            seconds = statistics.median(record["seconds"])
            line += f"{seconds * 1e3:.3f} ms"
            line += f"  {record['flops'] / seconds / 1e12:.3g} TFLOP/s" if record.get("flops") else ""
            line += f"  {record['bytes'] / seconds / 1e9:.4g} GB/s" if record.get("bytes") else ""
            line += f"  {record['memory'] / 2**20:.0f} MiB" if record.get("memory") else ""
        lines.append(line)
    return "\n".join(lines)


def table(outcomes: Sequence[Outcome]) -> str:
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    lines = []
    for outcome in outcomes:
        instead = f"  (not the real thing: {outcome.instead})" if outcome.instead else ""
        lines.append(f"{outcome.name:<{width}}  {outcome.seconds:6.1f} s  {outcome.status}{instead}")
    bad = [outcome.name for outcome in outcomes if not outcome.good]
    lines.append(f"NOT DONE: {', '.join(bad)}" if bad else "all steps are done, or were skipped for the reason given")
    return "\n".join(lines)
