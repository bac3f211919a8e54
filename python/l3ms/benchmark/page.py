"""The tables of docs/benchmarks.md, made from a committed results file and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from l3ms.benchmark.iteration_results import IterationResult
from l3ms.benchmark.results import CaseResult, Results
from l3ms.benchmark.tables import Grid, absences, bytes_text, machine, markdown, seconds_text

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
NOT_MEASURED = "*Not measured yet.*"
ITERATION_NOT_MEASURED = (
    "A whole iteration (task and constraint, beside a plain loop and TRL's SFT and GRPO steps): *not measured yet*; "
    "`make bench-iteration` fills this in."
)


def section(measured: Sequence[Results]) -> str:
    """What stands between the page's two marks: a table per machine."""
    tables = [_of_machine(results) for results in measured if results.cases]
    if not measured:
        return NOT_MEASURED
    return "\n\n".join([*tables, *(_iterations(measured) or [ITERATION_NOT_MEASURED])])


def _iterations(measured: Sequence[Results]) -> list[str]:
    """A table per machine: what a user waits for."""
    found = []
    for results in measured:
        if results.iterations:
            header = [
                "a whole iteration",
                *(f"{item.model}, {item.responses} responses" for item in results.iterations),
            ]
            names = dict.fromkeys(m.contestant for item in results.iterations for m in item.measurements if m.phases)
            rows = [_iteration_row(name, results.iterations) for name in names]
            best = list(names).index("l3ms") if "l3ms" in names else None
            found += [markdown(Grid("", header, rows, [], best)), f"{machine(results)}. By phase: {_link(results)}."]
    return found


def _iteration_row(name: str, iterations: Sequence[IterationResult]) -> list[str]:
    row = [""]
    for result in iterations:
        item = next((item for item in result.measurements if item.contestant == name and item.phases), None)
        if item is None:
            row.append("-")
            continue
        row[0] = item.title
        row.append(
            f"{seconds_text(item.seconds)} ({result.ratio(item) or 1:.2f}), {item.rate or 0:.0f} tokens/s, {bytes_text(item.memory)}"
        )
    return row


def _of_machine(results: Results) -> str:
    cases = _shown(results)
    first = cases[0]
    grid = _summary(cases)
    lines = [
        f"`weighted_log_likelihood`, forward and backward, n={first.rows}, D={first.hidden}, V={first.vocabulary}; "
        "in parentheses: as a multiple of ours. Memory is the peak beyond inputs and returned gradients, all rows scored.",
        markdown(grid),
        "\n".join(f"- {note}" for note in [*grid.notes, *_limits(cases)]),
        f"{machine(results)}. All cases: {_link(results)}.",
    ]
    return "\n\n".join(line for line in lines if line)


def _link(results: Results) -> str:
    name = f"bench/results/{results.name}.md"
    return f"[{name}](../{name})"  # from docs/


def _shown(results: Results) -> list[CaseResult]:
    """The cases of the first op and shape, in the order measured."""
    first = next((case for case in results.cases if case.op == "weighted"), results.cases[0])
    same = [case for case in results.cases if case.case[:2] == first.case[:2]]
    return sorted(same, key=lambda case: (case.dtype, case.masked))


def _summary(cases: list[CaseResult]) -> Grid:
    header = [""]
    for case in cases:
        header.append(f"{case.dtype}, {case.masked:.0%} unscored" if case.masked else f"{case.dtype}, all scored")
    measured = [case for case in cases if case.masked == min(case.masked for case in cases)]
    header += [f"memory, {case.dtype}" for case in measured]
    names = dict.fromkeys(item.contestant for case in cases for item in case.measurements if item.seconds)
    rows, best = [], None
    for name in names:
        found = [case.find(name) for case in cases]
        item = next(item for item in found if item is not None)
        row = [f"{item.title}{' *' if item.uniform else ''}"]
        for case, entry in zip(cases, found, strict=True):
            ratio = case.ratio(entry) if entry else None
            row.append(f"{seconds_text(entry.median if entry else None)}{f' ({ratio:.2f})' if ratio else ''}")
        for case in measured:
            entry = case.find(name)
            row.append(bytes_text(entry.memory if entry else None))
        if name == cases[0].ours:
            best = len(rows)
        rows.append(row)
    notes = absences(cases)
    if any(item.uniform and item.seconds for case in cases for item in case.measurements):
        notes.append("\\* one weight for all sequences, which is all that this function can do")
    return Grid("", header, rows, notes, best)


def _limits(cases: list[CaseResult]) -> list[str]:
    """How near ours is to the matrix products alone."""
    shares = []
    for case in cases:
        limit, ours = case.find("products"), case.find(case.ours)
        if limit and ours and limit.median and ours.median:
            shares.append(f"{limit.median / ours.median:.0%} in {case.dtype} with {case.masked:.0%} unscored")
    return [f"ours runs at this share of the speed of the bare products: {', '.join(shares)}"] if shares else []


def rewrite(page: Path, measured: Sequence[Results]) -> bool:
    """Put the section into the page; whether that changed it."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?\n{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page}: has no {BEGIN} ... {END}")
    changed = pattern.sub(lambda _: f"{BEGIN}\n{section(measured)}\n{END}", text)
    page.write_text(changed, encoding="utf-8")
    return changed != text
