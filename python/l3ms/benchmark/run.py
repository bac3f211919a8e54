"""One benchmark from end to end: the cases one after the other, progress, tables as they come, files that are whole at any time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from l3m_kernels import backends
from l3ms.benchmark import device, memory, scaling, tables
from l3ms.benchmark.contestant import Contestant
from l3ms.benchmark.contestants import NEEDED, contestants, our_backends
from l3ms.benchmark.environment import describe
from l3ms.benchmark.race import Race
from l3ms.benchmark.results import CaseResult, Results, gather, read, write
from l3ms.benchmark.shapes import QUICK, SCALING_CONSTRAINTS, SCALING_ROWS, Case
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.whole_files import write_whole

# Times a case's equal share of a budget that it may take: those that come first matter most, and give back what they do not need.
GENEROUS = 2.5
SCALING_PEERS = ("eager", "torch-none")


@dataclass(frozen=True)
class Plan:
    """What the options of the command line come to."""

    cases: tuple[Case, ...]
    contestants: tuple[str, ...] = ()  # none: all
    backend: str | None = None  # that ratios refer to; none: the one that `auto` takes
    rounds: int = 5
    seed: int = 0
    threads: int = 0  # 0: as many as torch takes
    memory: bool = True
    scaling: Case | None = None  # shape and dtype of the scaling measurements
    scaling_rows: tuple[int, ...] = SCALING_ROWS
    json: Path | None = None
    plot: Path | None = None
    output: Path | None = None  # folder for JSON, Markdown and PNG, named after the device
    add: bool = False  # keep what output's file has of other cases
    device: str = "cpu"
    budget: float | None = None  # seconds for all cases; the first ones may take more than their share

    def __post_init__(self):
        known = contestants(self.device)
        for name in self.contestants if self.cases or self.scaling else ():
            if name not in known:
                raise ConfigError("--contestants", f"must be one of {', '.join(known)}, got {name!r}")
        if self.backend is None:
            return
        rows = {row.name: row for row in backends().backends}
        if self.backend not in our_backends(self.device):
            names = ", ".join(our_backends(self.device))
            raise ConfigError("--backend", f"must be one of {names}, got {self.backend!r}")
        cases = (*self.cases, self.scaling._replace(op="weighted")) if self.scaling else self.cases
        for op in dict.fromkeys(op for case in cases for op in NEEDED[case.op]):
            if problem := rows[self.backend].problem(op, self.device):
                raise ConfigError("--backend", f"{self.backend} cannot run {op} here: {problem}")

    @property
    def entrants(self) -> list[Contestant]:
        known = contestants(self.device)
        return [known[name] for name in known if not self.contestants or name in self.contestants]


def begin(plan: Plan, suffix: str = "") -> tuple[Results, Path | None]:
    """What there is before anything was measured, and the file of `--output`: the device's name and `suffix`."""
    if plan.threads:
        torch.set_num_threads(plan.threads)
    environment = describe(plan.device)
    results = Results(
        environment=environment,
        threads=torch.get_num_threads(),
        rounds=plan.rounds,
        seed=plan.seed,
        budget=plan.budget,
    )
    target = plan.output / f"{environment.device}{suffix}.json" if plan.output else None
    if plan.add and target and target.exists():
        results = _continued(results, target)
    return results, target


def execute(plan: Plan, console: Console) -> Results:
    """Measure, print a table after each case, and write what the plan asks for."""
    results, target = begin(plan)
    steps = len(plan.cases) * len(plan.entrants) * (1 + plan.rounds + plan.memory)
    try:
        with progress(console, steps) as said:
            _measure_all(plan, results, target, console, said)
    except KeyboardInterrupt:
        if results.cases and (kept := [str(path) for path in (plan.json, target) if path]):
            console.print(
                f"kept: {len(results.cases)} cases in {', '.join(kept)}", markup=False, highlight=False, soft_wrap=True
            )
        raise
    console.print(tables.machine(results), style="dim", highlight=False)
    _draw(results, plan, target)
    return results


def _measure_all(
    plan: Plan, results: Results, target: Path | None, console: Console, said: Callable[[str], None]
) -> None:
    end = math.inf if plan.budget is None else time.monotonic() + plan.budget
    for index, case in enumerate(plan.cases):
        now = time.monotonic()
        if now > end:
            left = ", ".join(map(str, plan.cases[index:]))
            console.print(f"not measured, {plan.budget:g} s are over: {left}", markup=False, highlight=False)
            break
        share = GENEROUS / (len(plan.cases) - index)
        results.add(measure(case, plan, said, now + min(1, share) * (end - now)))
        save(results, plan, target)
        console.print(tables.terminal(tables.case_grid(results.cases[-1])))
    if plan.scaling:
        results.scaling = _scaling(plan.scaling, plan, said)
        save(results, plan, target)
        for found in results.scaling:
            console.print(tables.terminal(tables.scaling_grid(found)))


def measure(
    case: Case, plan: Plan, said: Callable[[str], None] = lambda name: None, deadline: float = math.inf
) -> CaseResult:
    """One case: memory in fresh processes, which shows who is too slow to be timed; then the check and the interleaved rounds.

    On a CUDA device the allocator knows the peak, and the bare products are timed apart.
    """
    forms = device.forms(case, plan.rounds) if case.device == "cuda" else {}
    race = Race(case, plan.entrants, plan.seed, deadline)
    apart = plan.memory and case.device == "cpu"
    peaks = measure_memory(race, plan.seed, lambda name: said(f"{case}: {name}, memory")) if apart else {}
    race.check(lambda name: said(f"{case}: {name}, first call"))
    race.time(plan.rounds, lambda name: said(f"{case}: {name}"))
    result = gather(race, ours_of(race, plan.backend))
    result.forms = forms
    if apart:
        enter_memory(result, peaks)
    return result


def measure_memory(race: Race, seed: int, said: Callable[[str], None] = lambda name: None) -> dict[str, int | str]:
    """Contestant -> bytes, or why they were not measured; who is too slow to be timed is out of the race."""
    peaks: dict[str, int | str] = {}
    for name in race.running:
        entry = race.entries[name]
        if entry.contestant.kind == "limit":
            continue
        said(name)
        limit = memory.LIMIT_COMPILED if entry.contestant.compiled else memory.LIMIT
        try:
            peaks[name] = memory.measure(name, race.case, torch.get_num_threads(), seed, limit)
        except memory.NotMeasured as why:
            peaks[name] = str(why)
            if isinstance(why, memory.TooSlow):
                entry.stop(str(why))
    return peaks


def enter_memory(result: CaseResult, peaks: Mapping[str, int | str]) -> None:
    for item in result.measurements:
        found = peaks.get(item.contestant)
        item.memory = found if isinstance(found, int) else None
        item.memory_reason = found if isinstance(found, str) and item.seconds else None


def ours_of(race: Race, backend: str | None) -> str | None:
    """The contestant that ratios refer to."""
    candidates = [backend] if backend else our_backends(race.case.device)
    return next((name for name in candidates if name in race.running), None)


def _continued(results: Results, target: Path) -> Results:
    """An earlier file of the same machine and versions, to add to."""
    earlier = read(target)
    same = earlier.environment.same_software(results.environment) and earlier.threads == results.threads
    if not same:
        raise ConfigError("--add", f"{target} was measured with other versions, machine or threads; leave --add out")
    return earlier


def _scaling(like: Case, plan: Plan, said: Callable[[str], None]) -> list:
    known = contestants(plan.device)
    ours = plan.backend
    if ours is None:
        ready = (row.name for row in backends().backends if row.problem("weighted_log_likelihood", plan.device) is None)
        ours = next(name for name in ready if name in our_backends(plan.device))
    names = plan.contestants or (ours, *SCALING_PEERS)
    chosen = [known[name] for name in names]
    common = (plan.rounds, plan.seed, lambda text: said(f"scaling {like.shape} {like.dtype}: {text}"))
    return [
        scaling.over_rows(plan.scaling_rows, like, chosen, *common),
        scaling.over_constraints(SCALING_CONSTRAINTS, like, ours, *common),
    ]


def save(results: Results, plan: Plan, target: Path | None) -> None:
    for path in (plan.json, target):
        if path:
            write(results, path)
    if target:
        write_whole(target.with_suffix(".md"), tables.report(results))


def _draw(results: Results, plan: Plan, target: Path | None) -> None:
    from l3ms.benchmark import figure

    for path in (plan.plot, target.with_suffix(".png") if target else None):
        if path and results.cases:
            figure.save(results, path)


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar in a terminal; elsewhere a line for each case and phase on standard error."""
    if not console.is_terminal:
        plain, last = Console(stderr=True), ""

        def line(text: str) -> None:
            nonlocal last
            if (case := text.partition(":")[0]) != last:
                last = case
                plain.print(f"measuring {case}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, advance=1, description=escape(text))


def scaling_case(cases: tuple[Case, ...]) -> Case:
    """Shape and dtype for the scaling measurements: those of the first case, else of `QUICK`."""
    return (cases[0] if cases else QUICK)._replace(op="weighted", masked=0.0)
