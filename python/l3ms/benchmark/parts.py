"""The head within several workspaces, and what else was timed apart, entered into a results file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from l3m_kernels import set_workspace
from l3ms.benchmark import device, tables
from l3ms.benchmark.contestant import Unavailable, prepare
from l3ms.benchmark.contestants import contestants
from l3ms.benchmark.environment import describe
from l3ms.benchmark.inputs import Source
from l3ms.benchmark.race import clock
from l3ms.benchmark.records import of_json
from l3ms.benchmark.results import Part, Results, read, write
from l3ms.benchmark.shapes import Case
from l3ms.runs.whole_files import write_whole


def over_workspaces(sizes: Sequence[int], case: Case, name: str, rounds: int, seed: int) -> Iterator[Part]:
    """Time, and on a CUDA device the peak, of a contestant of ours for each size in bytes."""
    on_gpu = case.device == "cuda"
    group = f"{case}, within a workspace"
    try:
        run = prepare(contestants(case.device)[name], case, keep_workspace=True)
    except Unavailable as why:
        yield Part(group=group, title=name, reason=str(why))
        return
    source = Source(case, seed)
    first, *batches = (source.draw(index) for index in range(rounds + 1))
    for size in sizes:
        set_workspace(size)
        try:
            run(first)
            peak = device.peak(run, first) if on_gpu else None
            seconds = [(device.clock if on_gpu else clock)(run, batch) for batch in batches]
        finally:
            set_workspace(None)
        title = f"{name}, {tables.bytes_text(size)}"
        yield Part(group=group, title=title, seconds=seconds, flops=case.flops, memory=peak)


def begun(target: Path, on: str, rounds: int, seed: int, budget: float | None) -> Results:
    """The results that a file has, or none yet."""
    if target.exists():
        return read(target)
    return Results(environment=describe(on), threads=torch.get_num_threads(), rounds=rounds, seed=seed, budget=budget)


def save(results: Results, target: Path) -> None:
    write(results, target)
    write_whole(target.with_suffix(".md"), tables.report(results))


def parts_of(records: Iterable[dict[str, Any]]) -> list[Part]:
    """Those records that are parts."""
    return [of_json(Part, record) for record in records if "group" in record]
