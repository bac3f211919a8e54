"""Runs the cells of a grid: `l3ms train` and then `l3ms certify`, each a process of its own, a few at a time.

FOLDER/cells/NAME/seed-N/config.yaml   what the cell is
                         run/          the run folder of `l3ms train`, with certificate.json
                         log.txt       what the commands have printed
                         machine.txt   where, and with how many cores
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.grid import Cell
from l3ms.benchmark.environment import machine
from l3ms.config.yaml_reader import ConfigError, read_yaml

VERDICTS = {0: "satisfied", 3: "violated", 4: "inconclusive"}  # exit codes of `l3ms certify` that are no failure
CERTIFICATE = "certificate.json"
MACHINE = "machine.txt"

Command = Callable[[list[str], Path, Mapping[str, str]], int]  # (words, log file, environment) -> exit code


class Outcome(NamedTuple):
    cell: Cell
    error: str | None = None  # what went wrong, in one line
    skipped: bool = False  # finished before


def cell_folder(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / cell.name / f"seed-{cell.seed}"


def run_folder(folder: Path, cell: Cell) -> Path:
    return cell_folder(folder, cell) / "run"


def execute(words: list[str], log: Path, environment: Mapping[str, str]) -> int:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        return subprocess.run(
            words, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), check=False
        ).returncode


def cores() -> int:
    """That this process may use, which `taskset` and container limits make fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment_of(jobs: int) -> dict[str, str]:
    """Of one of `jobs` cells at a time: its share of the cores."""
    threads = str(max(1, cores() // jobs))
    return {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int = 2,
    allow_code: bool = False,
    console: Console | None = None,
    command: Command | None = None,
) -> list[Outcome]:
    """Run what is not finished yet, `jobs` at a time, each on its share of the cores; a cell that fails is told, and the others go on.

    `cells` have no placeholders left. A cell is finished when its run folder has a report of the same configuration, and a certificate
    if it wants one. Returns one outcome per cell, in order.
    """
    console, command = console or Console(), command or execute
    environment = environment_of(jobs)
    outcomes: dict[str, Outcome] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    start = time.monotonic()
    with (
        ThreadPoolExecutor(jobs) as pool,
        Progress(*columns, console=console, speed_estimate_period=3600, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("cells", total=len(cells), note="")
        waiting: dict[Future[Outcome], Cell] = {
            pool.submit(_run, cell, folder, allow_code, environment, command): cell for cell in cells
        }
        try:
            while waiting:
                done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in [
                    future for future in waiting if future in done
                ]:  # of those that ended together, in order
                    cell = waiting.pop(future)
                    outcomes[cell.key] = future.result()
                    _tell(outcomes[cell.key], len(outcomes), len(cells), time.monotonic() - start, console)
                shares = [_share(cell, folder) for future, cell in waiting.items() if future.running()]
                note = f"{len(outcomes)} of {len(cells)} done"
                bar.update(task, completed=len(outcomes) + sum(shares), note=note)
        except KeyboardInterrupt:  # the processes get it too
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [outcomes[cell.key] for cell in cells]


def is_trained(cell: Cell, folder: Path) -> bool:
    """Whether the run folder has the report of a run of just this configuration."""
    return _is_same(cell, folder) and (run_folder(folder, cell) / "report.json").exists()


def _is_same(cell: Cell, folder: Path) -> bool:
    """Whether what was begun there is of this configuration."""
    try:
        return read_yaml(cell_folder(folder, cell) / "config.yaml") == dict(cell.config)
    except ConfigError:
        return False


def _run(cell: Cell, folder: Path, allow_code: bool, environment: Mapping[str, str], command: Command) -> Outcome:
    place, run = cell_folder(folder, cell), run_folder(folder, cell)
    certificate = run / CERTIFICATE
    trained = is_trained(cell, folder)
    if trained and (cell.certify is None or certificate.exists()):
        return Outcome(cell, skipped=True)
    l3ms = [sys.executable, "-m", "l3ms"]
    code = ["--allow-code"] if allow_code else []
    place.mkdir(parents=True, exist_ok=True)
    log = place / "log.txt"
    if not trained:
        config = place / "config.yaml"
        begun = _is_same(cell, folder)  # and was ended: it goes on where it was
        for left in (certificate, *(() if begun else (run / "report.json", run / "config.yaml"))):
            left.unlink(missing_ok=True)  # of another configuration: not to be taken for this one's
        config.write_text(yaml.safe_dump(dict(cell.config), sort_keys=False, allow_unicode=True), encoding="utf-8")
        log.unlink(missing_ok=True)
        (place / MACHINE).write_text(f"{machine(int(environment['OMP_NUM_THREADS']))}\n", encoding="utf-8")
        status = command(
            [*l3ms, "train", str(config), "--output", str(run), "--resume" if begun else "--overwrite", *code],
            log,
            environment,
        )
        if status:
            return Outcome(cell, f"l3ms train ended with exit code {status}: {last_line(log)}")
    if cell.certify is not None:
        options = ["--samples", str(cell.certify), "--json", str(certificate), *code]
        status = command([*l3ms, "certify", str(run), *options], log, environment)
        if status not in VERDICTS:
            return Outcome(cell, f"l3ms certify ended with exit code {status}: {last_line(log)}")
        if not certificate.exists():
            return Outcome(cell, f"l3ms certify has written no {CERTIFICATE}")
    return Outcome(cell)


def _share(cell: Cell, folder: Path) -> float:
    """How far a running cell is, from the iterations it has logged; sampling and certifying are the last tenth."""
    try:
        with (run_folder(folder, cell) / "metrics.jsonl").open("rb") as file:
            done = sum(1 for _ in file)
    except OSError:
        return 0.0
    wanted: Any = cell.config.get("train") or {}
    return 0.9 * min(1.0, done / wanted.get("iterations", 200))


def _tell(outcome: Outcome, done: int, total: int, seconds: float, console: Console) -> None:
    if outcome.error:
        console.print(f"FAILED {outcome.cell.key}: {outcome.error}", markup=False, highlight=False, soft_wrap=True)
    elif not console.is_terminal:
        left = f", about {seconds / done * (total - done) / 60:.0f} min left" if done < total else ""
        word = "finished before" if outcome.skipped else "finished"
        console.print(f"{done}/{total} {outcome.cell.key} {word}{left}", markup=False, highlight=False, soft_wrap=True)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it has printed nothing"
