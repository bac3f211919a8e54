"""What is published of an experiment, and read back: a table goes on on another machine, and can be drawn again without the runs.

results.json   what the experiment was and what each cell has come to
runs.jsonl     the rest of a cell, in one line: the series that are drawn, and what it answered
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.data_files import fingerprint, json_lines
from experiments.grid import Cell
from experiments.results import Result

RESULTS, RUNS = "results.json", "runs.jsonl"
OF_THE_MACHINE = ("here", "bfloat16")  # placeholders that say nothing about what a cell is

_LONG = ("metrics", "examples")
_DRAWN = re.compile(
    r"iteration|loss|l3m/sampled_tokens|l3m/constraint_step|constraints/.+/(estimate|stderr|batch_mean|lambda\w*)"
)


def contents(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the inputs are, wherever they are: `values` of the placeholders, a hash in the place of a path."""
    return {name: _content(value) for name, value in values.items() if name not in OF_THE_MACHINE}


def identity(config: Mapping[str, Any], certify: int | None, contents: Mapping[str, Any]) -> str:
    """A hash of what a cell is: its settings (`config`, with placeholders), the samples of its certificate, its inputs' `contents`."""
    text = json.dumps([config, certify, contents], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(value: Any) -> Any:
    """Of a file its hash, of a model's folder that of its weights; else the value."""
    path = Path(value) if isinstance(value, str) else None
    if path is None or not path.exists():
        return value
    return " ".join(map(fingerprint, [path] if path.is_file() else sorted(path.glob("*.safetensors"))))


def write(results: Sequence[Result], folder: Path, facts: Mapping[str, Any], *, texts: bool = True) -> None:
    """Both files. `texts`: with the prompts and the responses to them."""
    rows, runs = [], []
    for result in results:
        row = asdict(result)
        long = {name: row.pop(name) for name in _LONG}
        if row["certificate"]:
            row["certificate"].pop("run", None)  # a path of this machine
        rows.append(row)
        series = _columns(long["metrics"])
        runs.append({"cell": result.key, "metrics": series, "examples": long["examples"] if texts else []})
    text = json.dumps({**facts, "cells": rows}, indent=1, ensure_ascii=False)
    (folder / RESULTS).write_text(f"{text}\n", encoding="utf-8")
    lines = (f"{json.dumps(run, ensure_ascii=False, separators=(',', ':'))}\n" for run in runs)
    (folder / RUNS).write_text("".join(lines), encoding="utf-8")


def read(folder: Path, cells: Sequence[Cell]) -> dict[str, Result]:
    """By key, those of the cells that are published in `folder` with the same identity."""
    if not (folder / RUNS).exists():
        return {}
    wanted = {cell.key: cell.identity for cell in cells}
    runs = {run["cell"]: run for run in map(json.loads, json_lines(folder / RUNS))}
    found = {}
    for row in json.loads((folder / RESULTS).read_text(encoding="utf-8"))["cells"]:
        result = Result(**{**row, "labels": tuple(row["labels"])})
        if result.identity and wanted.get(result.key) == result.identity and result.key in runs:
            run = runs[result.key]
            found[result.key] = replace(result, metrics=_rows(run["metrics"]), examples=run["examples"])
    return found


def _columns(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for row in metrics for name in row if _DRAWN.fullmatch(name)))
    return {name: [_short(row.get(name)) for row in metrics] for name in names}


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    count = max(map(len, columns.values()), default=0)
    return [
        {name: values[index] for name, values in columns.items() if values[index] is not None} for index in range(count)
    ]


def _short(value: Any) -> Any:
    """Six digits are more than a picture shows."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
