"""What the lines of a log say of where the time went: medians and shares by phase, in numbers and in words. Without torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

# Forward and backward of the task; responses; their rewards, waited for; forward and backward of the constraints; the steps; and all else
PHASES = ("task", "sampling", "rewards", "constraint", "optimizer", "evaluation", "saving", "other")


def seconds_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds by phase, and of the whole iteration, from the lines of a log."""
    timed = [row for row in rows if isinstance(row.get("time/iteration"), (int, float))]
    return {name: [float(row.get(f"time/{name}") or 0.0) for row in timed] for name in (*PHASES, "iteration") if timed}


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a report says of a log: medians of the seconds, shares of the whole, tokens sampled per second, peak memory.

    A phase that is in few iterations (saving) has a median of 0, and its share all the same.
    """
    rows = list(rows)
    seconds = seconds_of(rows)
    if not seconds:
        return None
    whole = sum(seconds["iteration"])
    rates, peaks = (
        [float(row[key]) for row in rows if isinstance(row.get(key), (int, float))]
        for key in ("time/sampled_tokens_per_second", "memory/peak_mib")
    )
    return {
        "iteration": statistics.median(seconds["iteration"]),
        "phases": {
            name: {"seconds": statistics.median(seconds[name]), "share": sum(seconds[name]) / whole if whole else 0.0}
            for name in PHASES
        },
        "sampled_tokens_per_second": statistics.median(rates) if rates else None,
        "peak_memory_mib": max(peaks, default=None),
    }


def in_words(found: Mapping[str, Any]) -> str:
    """`2.4 s per iteration: sampling 45%, constraint 35%, ...; 182 tokens sampled per second; at most 1.3 GiB`, largest shares first."""
    shares = sorted(((item["share"], name) for name, item in found["phases"].items()), reverse=True)
    parts = ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)
    lines = [f"{found['iteration']:.3g} s per iteration: {parts}"]
    if found.get("sampled_tokens_per_second"):
        lines.append(f"{found['sampled_tokens_per_second']:.0f} tokens sampled per second")
    if peak := found.get("peak_memory_mib"):
        lines.append(f"at most {peak:.0f} MiB" if peak < 1024 else f"at most {peak / 1024:.1f} GiB")
    return "; ".join(lines)
