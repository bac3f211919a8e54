"""`python -m experiments.versus.cell FOLDER`: one contestant, one setting, one seed, in a process of its own.

FOLDER/cell.json      what it is (`run.py` writes it)
       trained.json   when the training has ended: weights, sampled tokens, seconds of all cores together, log
       result.json    when the judge has spoken

Seconds are the process's own, whatever else the machine does beside it.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from experiments.data_files import fingerprint
from experiments.versus.task import Contestant, Task

CELL, TRAINED, RESULT = "cell.json", "trained.json", "result.json"


def run(folder: Path) -> None:
    """Train where that is not done, then judge."""
    from experiments.versus.judge import judged
    from l3ms.benchmark.environment import machine
    from l3ms.runs.whole_files import write_json

    cell = json.loads((folder / CELL).read_text(encoding="utf-8"))
    task, setting = Task(**cell["task"]).with_setting(cell["setting"])
    if not (folder / TRAINED).exists():
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        contestant: Contestant = importlib.import_module(f"experiments.versus.{cell['module']}")  # type: ignore[assignment]
        start = time.process_time()
        trained = contestant.train(task, setting, work)
        values: dict[str, Any] = {
            "weights": str(trained.weights.relative_to(folder)),
            "sampled_tokens": trained.sampled_tokens,
            "seconds": round(time.process_time() - start, 1),
            "machine": machine(),
            "rows": fingerprint(Path(task.train)),  # that it learnt from
            "log": trained.log,
        }
        write_json(folder / TRAINED, values)
    weights = folder / json.loads((folder / TRAINED).read_text(encoding="utf-8"))["weights"]
    write_json(folder / RESULT, {**judged(task, weights, **cell["judge"]), "machine": machine()})


if __name__ == "__main__":
    run(Path(sys.argv[1]))
