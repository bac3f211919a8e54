"""Results as tables: rows of text once, shown in the terminal (rich), in a Markdown file and in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from l3ms.benchmark.environment import WIDEST
from l3ms.benchmark.iteration_results import SHOWN, IterationResult
from l3ms.benchmark.results import CaseResult, Measurement, Part, Results, Scaling
from l3ms.benchmark.shapes import OP_TITLES


class Grid(NamedTuple):
    """A table as text: the first column is of names, the others of numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    best: int | None = None  # the row of ours


def seconds_text(value: float | None) -> str:
    """1.23 s, 45.6 ms, 789 µs: three digits."""
    if value is None:
        return "-"
    factor, unit = next((f, u) for f, u in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")) if value * f >= 1 or u == "µs")
    return f"{_digits(value * factor)} {unit}"


def bytes_text(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{_digits(value / 2**30)} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def case_grid(result: CaseResult) -> Grid:
    """One case: a line per contestant, in the order of the contestants; who did not run is in the notes, with the reason."""
    on_gpu, unit = (True, "TFLOP/s") if result.device == "cuda" else (False, "GFLOP/s")
    header = ["", "time", "time / ours", unit, *(["of the products"] if result.forms else []), "memory", "error"]
    ran = [item for item in result.measurements if item.seconds]
    rows = [
        [
            _label(item),
            seconds_text(item.median),
            _number(result.ratio(item), ".2f"),
            _number(_rate(result, item, on_gpu), ".0f"),
            *([_number(result.share(item), ".0%")] if result.forms else []),
            bytes_text(item.memory),
            _number(item.error, ".0e"),
        ]
        for item in ran
    ]
    title = (
        f"{OP_TITLES[result.op]}: n={result.rows} ({result.scored} scored), D={result.hidden}, "
        f"V={result.vocabulary}, {result.dtype}"
    )
    notes = [f"mean nll of the targets {result.nll:.2f}"] if result.nll is not None else []
    if result.forms:
        rate = {form: result.flops / len(result.forms) / seconds / 1e12 for form, seconds in result.forms.items()}
        notes.append(f"bare products, TFLOP/s: {', '.join(f'{form} {value:.0f}' for form, value in rate.items())}")
    notes += absences([result])
    if any(item.uniform for item in ran):
        notes.append("* one weight for all sequences, which is all that this function can do")
    notes += _unmeasured(ran)
    best = next((index for index, item in enumerate(ran) if item.contestant == result.ours), None)
    return Grid(title, header, rows, notes, best)


def _rate(result: CaseResult, item: Measurement, on_gpu: bool) -> float | None:
    value = result.gflops(item)
    return value / 1e3 if value and on_gpu else value


def _label(item: Measurement) -> str:
    return f"{item.title}{' *' if item.uniform else ''}"


def absences(results: Iterable[CaseResult]) -> list[str]:
    """`not run: A, B (why)`, one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        for item in result.measurements:
            if item.reason and _label(item) not in reasons.setdefault(item.reason, []):
                reasons[item.reason].append(_label(item))
    return [f"not run: {'; '.join(titles)}: {why}" for why, titles in reasons.items()]


def _unmeasured(ran: Iterable[Measurement]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for item in ran:
        if item.memory_reason:
            reasons.setdefault(item.memory_reason, []).append(item.title)
    return [f"memory not measured: {'; '.join(titles)}: {why}" for why, titles in reasons.items()]


def scaling_grid(scaling: Scaling) -> Grid:
    """A line per size; for rows also the time per row against the largest size, for constraints against the fewest."""
    sizes = sorted({point.size for point in scaling.points})
    names = list(dict.fromkeys((point.contestant, point.title) for point in scaling.points))
    found = {(point.size, point.contestant): point.median for point in scaling.points}
    over_rows = scaling.over == "rows"
    what = "rows" if over_rows else f"constraints, n={scaling.rows}"
    title = f"Time over {what}: D={scaling.hidden}, V={scaling.vocabulary}, {scaling.dtype}"
    header = ["rows" if over_rows else "constraints"]
    for _, label in names:
        header += [label, "per row" if over_rows else f"/ {sizes[0]} constraint{'s' * (sizes[0] != 1)}"]
    rows = []
    for size in sizes:
        row = [str(size)]
        for name, _ in names:
            value, base = found.get((size, name)), found.get((sizes[0], name))
            row.append(seconds_text(value))
            if over_rows:
                row.append(seconds_text(value / size if value else None))
            else:
                row.append(_number(value / base if value and base else None, ".3f"))
        rows.append(row)
    absent = {point.title: point.reason for point in scaling.points if point.reason}
    return Grid(title, header, rows, [f"not run: {title}: {why}" for title, why in absent.items()])


def iteration_grid(result: IterationResult) -> Grid:
    """A line per contestant: the iteration, its phases, tokens sampled per second, memory."""
    header = ["", "iteration", "time / ours", *SHOWN, "tokens/s", "memory", "error"]
    ran = [item for item in result.measurements if item.phases]
    rows = [
        [
            item.title,
            seconds_text(item.seconds),
            _number(result.ratio(item), ".2f"),
            *(seconds_text(item.phase(name)) for name in SHOWN),
            _number(item.rate, ".0f"),
            bytes_text(item.memory),
            _number(item.error, ".0e"),
        ]
        for item in ran
    ]
    notes = [f"not run: {item.title}: {item.reason}" for item in result.measurements if item.reason]
    notes.append(
        f"tokens sampled in an iteration: {', '.join(f'{item.title} {sum(item.tokens) / len(item.tokens):.0f}' for item in ran)}"
    )
    notes.append(
        "memory: the peak beyond what was there before the iteration; error: of the gradients, relative to ours"
    )
    best = next((index for index, item in enumerate(ran) if item.kind == "ours"), None)
    return Grid(result.title, header, rows, notes, best)


def part_grid(group: str, parts: Sequence[Part]) -> Grid:
    """Parts of the work that were timed by themselves: a line each, in the order measured."""
    ran = [part for part in parts if part.seconds]
    rates = [
        ("TFLOP/s", lambda part: part.flops and part.flops / part.median / 1e12),
        ("GB/s", lambda part: part.bytes and part.bytes / part.median / 1e9),
        ("memory", lambda part: part.memory),
    ]
    shown = [(title, value) for title, value in rates if any(value(part) for part in ran)]
    rows = []
    for part in ran:
        values = [
            bytes_text(value(part)) if title == "memory" else _number(value(part), ".0f") for title, value in shown
        ]
        rows.append([part.title, seconds_text(part.median), *values])
    notes = [f"not run: {part.title}: {part.reason}" for part in parts if part.reason]
    return Grid(group, ["", "time", *(title for title, _ in shown)], rows, notes)


def grids(results: Results) -> list[Grid]:
    groups = dict.fromkeys(part.group for part in results.parts)
    found = [*map(iteration_grid, results.iterations), *map(case_grid, results.cases)]
    found += [scaling_grid(scaling) for scaling in results.scaling]
    return found + [part_grid(name, [part for part in results.parts if part.group == name]) for name in groups]


def terminal(grid: Grid) -> Group:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, heading in enumerate(grid.header):
        table.add_column(escape(heading), justify="right" if index else "left", no_wrap=index > 0)
    for index, row in enumerate(grid.rows):
        table.add_row(*map(escape, row), style="bold green" if index == grid.best else None)
    notes = [Text(f"  {note}", style="dim") for note in grid.notes]
    return Group(Text(grid.title, style="bold"), table, *notes, "")


def markdown(grid: Grid) -> str:
    lines = ["| " + " | ".join(grid.header) + " |", "|---|" + "---:|" * (len(grid.header) - 1)]
    for index, row in enumerate(grid.rows):
        cells = [f"**{cell}**" if index == grid.best else cell for cell in map(_cell, row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def machine(results: Results) -> str:
    """One line on where and when."""
    environment = results.environment
    fast = [flag for flag in environment.isa if flag in WIDEST]
    versions = [f"{name} {version}" for name, version in environment.packages.items()]
    where = [
        f"{environment.cpu} ({' '.join(fast) or environment.system})",
        f"{results.threads} thread{'s' * (results.threads != 1)}",
    ]
    if environment.gpu:
        where = [f"{environment.gpu}, CUDA {environment.cuda}"]
    return ", ".join(
        [
            *where,
            f"torch {environment.torch}",
            f"Python {environment.python}",
            f"l3m_kernels {environment.l3m_kernels}",
            *versions,
            environment.date[:10],
        ]
    )


def report(results: Results) -> str:
    """The Markdown file beside the JSON."""
    environment = results.environment
    where, unit = ("by the allocator", "TFLOP/s") if environment.gpu else ("in a fresh process", "GFLOP/s")
    of_the_head = (
        f"; memory is the peak beyond inputs and what is returned, {where}; error is the distance of the gradients (without gradients: of "
        f"the log-likelihoods) from float64, relative; {unit} counts what the op needs on the scored rows"
    )
    rounds = f"Median of up to {results.rounds} interleaved rounds, seed {results.seed}"
    parts = [
        f"# Benchmark: {environment.gpu or environment.cpu}",
        f"{machine(results)}.",
        f"{rounds}{of_the_head if results.cases or results.scaling else ''}. "
        f"Every round is in [{results.name}.json]({results.name}.json).",
    ]
    for grid in grids(results):
        parts += [f"## {grid.title}", markdown(grid)]
        if grid.notes:
            parts.append("\n".join(f"- {note}" for note in map(_cell, grid.notes)))
    return "\n\n".join(parts) + "\n"
