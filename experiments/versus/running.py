"""Runs the cells, each a process of its own, a few at a time; what is finished is kept."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from experiments.cells import environment_of, execute, last_line
from experiments.versus.cell import CELL, RESULT, TRAINED
from experiments.versus.contest import Cell
from l3ms.runs.whole_files import write_json

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[[list[str], Path, Mapping[str, str]], int]  # (words, log file, environment) -> exit code


def cell_folder(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / cell.key


def is_finished(cell: Cell, folder: Path) -> bool:
    return _written(cell_folder(folder, cell)) == cell.values and (cell_folder(folder, cell) / RESULT).exists()


def is_certified(cells: Sequence[Cell], cell: Cell, folder: Path) -> bool:
    """Whether an earlier try of the same contestant with the same seed has its certificate."""
    before = [
        other
        for other in cells
        if (other.contestant, other.seed) == (cell.contestant, cell.seed) and other.number < cell.number
    ]
    found = (cell_folder(folder, other) / RESULT for other in before if is_finished(other, folder))
    return any(json.loads(path.read_text(encoding="utf-8"))["verdict"] == "SATISFIED" for path in found)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int,
    console: Console,
    first: bool = False,
    command: Command = execute,
) -> dict[str, str]:
    """Cells that others go on from come first, then everybody's first try, second try, ... A cell that fails is told, the others go on.

    first: leave a contestant's further tries with a seed out once one is certified. Returns what went wrong, by key.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    environment = environment_of(jobs) | {"PYTHONPATH": paths}
    begun_from = {cell.after for cell in cells}
    waves: dict[int, list[Cell]] = {}
    for cell in cells:
        waves.setdefault(-1 if cell.key in begun_from else cell.number, []).append(cell)
    errors: dict[str, str] = {}
    start, done, ran = time.monotonic(), 0, 0
    for _, wave in sorted(waves.items()):
        with ThreadPoolExecutor(jobs) as pool:
            running = {}
            for cell in wave:
                if first and is_certified(cells, cell, folder):
                    done += 1
                elif cell.after in errors:
                    errors[cell.key] = f"{cell.after} has failed"
                else:
                    running[pool.submit(_run, cell, folder, environment, command)] = cell
            try:
                for future in as_completed(running):
                    cell, found = running[future], future.result()
                    done, ran = done + 1, ran + (found is not None)
                    if found:
                        errors[cell.key] = found
                        console.print(f"FAILED {cell.key}: {found}", markup=False, highlight=False, soft_wrap=True)
                        continue
                    left = (time.monotonic() - start) / max(1, ran) * (len(cells) - done) / 60
                    word = "finished before" if found is None else f"finished, at most {left:.0f} min left"
                    console.print(
                        f"{done}/{len(cells)} {cell.key} {word}", markup=False, highlight=False, soft_wrap=True
                    )
            except KeyboardInterrupt:  # the processes get it too
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return errors


def _run(cell: Cell, folder: Path, environment: Mapping[str, str], command: Command) -> str | None:
    """What went wrong, "" where nothing did, None where the cell was finished before."""
    if is_finished(cell, folder):
        return None
    place = cell_folder(folder, cell)
    before = _written(place)
    same = {**before, "judge": None} == {**cell.values, "judge": None}
    if not same:  # another task or setting: nothing of it is this cell's
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, *(() if same and _has_weights(place) else (TRAINED,))):
        (place / name).unlink(missing_ok=True)
    write_json(place / CELL, dict(cell.values))
    log = place / "log.txt"
    status = command([sys.executable, "-m", "experiments.versus.cell", str(place)], log, environment)
    if status or not (place / RESULT).exists():
        return f"ended with exit code {status}: {last_line(log)}"
    return ""


def _written(place: Path) -> dict:
    try:
        return json.loads((place / CELL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _has_weights(place: Path) -> bool:
    try:
        return (place / json.loads((place / TRAINED).read_text(encoding="utf-8"))["weights"]).is_dir()
    except (OSError, ValueError, KeyError):
        return False
