"""What a run has changed of the loss on the instructions, row by row: the rows differ much more than what a run does to each."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from experiments.real.forgetting.losses import row_losses
from experiments.real.forgetting.prepare import LOSSES
from l3ms.verdicts.quantiles import student_t_quantile


def measure(run: Path, values: dict[str, Any]) -> dict[str, Any]:
    """{"change": mean of after - before on the held-out instructions, "ci95", "rows"}, nats per token, of the averaged weights."""
    rows = Path(values["kept_held_out"])
    before = json.loads((rows.parent / LOSSES).read_text(encoding="utf-8"))
    after = row_losses(str(run / "average"), rows)
    return change(before, after)


def change(before: list[float], after: list[float | None]) -> dict[str, Any]:
    """With Student's interval of the differences."""
    found = [new - old for old, new in zip(before, after, strict=True) if new is not None]
    mean = statistics.fmean(found)
    half = student_t_quantile(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return {"change": mean, "ci95": [mean - half, mean + half], "rows": len(found)}
