"""The table of a study on the real model: a row per cell and seed, what the certificate says of each constraint, and responses to read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from experiments.presenting import by_cell, machine_letters, markdown, number
from experiments.results import Result
from l3ms.runs.labels import bounds_text

SHORT = 4  # tokens: a response of fewer is none
LONGEST_TEXT = 300  # characters of a prompt or response that are shown
Name = Callable[[Result], str]


def table(results: Sequence[Result], name: Name) -> str:
    header = (
        "", "seed", "wanted", "estimate at the end", "certificate: mean [bounds]", "verdict", "monitors: mean [bounds]",
        "task perplexity", "of SFT's", f"under {SHORT} tokens", "at the cap", "minutes", "sampled tokens",
    )  # fmt: skip
    rows, letters = [], machine_letters(result.machine for result in results)
    for result in results:
        bounded = [item for item in result.bounds if (item["min"], item["max"]) != (None, None)]
        monitors = [item for item in result.bounds if item not in bounded]
        names = [item["name"] for item in bounded]
        rows.append((
            name(result), str(result.seed),
            "<br>".join(f"{shown(item['name'])} {bounds_text(item['min'], item['max'])}" for item in bounded) or "-",
            "<br>".join(number(estimate(result, item), ".3g") for item in names) or "-",
            "<br>".join(certified(result, item) for item in names) or "-",
            "<br>".join(result.verdicts.get(item, "-") for item in names) or "-",
            "<br>".join(f"{shown(item['name'])} {certified(result, item['name'])}" for item in monitors) or "-",
            number(result.summary.get("perplexity")), number(result.ratio, ".3f"),
            f"{100 * share_below(result, SHORT):.1f}%", f"{100 * (1 - result.summary['ended']):.1f}%",
            f"{result.minutes:.1f} {letters[result.machine]}", number(result.sampled_tokens, ",.0f"),
        ))  # fmt: skip
    return f"{markdown(header, rows)}\n{note(results)}"


def note(results: Sequence[Result]) -> str:
    samples = results[0].summary["samples"]
    certificates = sorted({run.certificate["samples"] for run in results if run.certificate})
    letters = machine_letters(result.machine for result in results)
    machines = "; ".join(f"{letter}: {place or 'not recorded'}" for place, letter in letters.items())
    certified_by = (
        f"{' or '.join(map(str, certificates))} fresh samples on held-out prompts" if certificates else "none made"
    )
    return (
        f"Certificates: {certified_by}, of the averaged weights; the bounds hold together with 95%. Perplexity, short and cut "
        f"responses: {samples} held-out rows. Minutes: of training, its samples at the end and the certificate "
        f"({machines}). Sampled tokens: those of the training. The plain fine-tuning has the bounds of its row only to be judged by them.\n"
    )


def responses(results: Sequence[Result], name: Name, *, show: Callable[[str], str] = str, prompts: bool = True) -> str:
    """What the cells answer to the same prompts, of the first seed; `show` is applied to each response."""
    runs = [next(iter(sorted(cell, key=lambda run: run.seed))) for cell in by_cell(results).values()]
    seed = min((run.seed for run in runs), default=0)
    runs = [run for run in runs if run.seed == seed and run.examples]
    lines = [f"## Responses (seed {seed}, the first held-out prompts)", ""]
    for index, example in enumerate(runs[0].examples if runs else []):
        lines += [literal(example["prompt"]) if prompts else f"Prompt {index + 1}", ""]
        for run in runs:
            if index >= len(run.examples) or run.examples[index]["prompt"] != example["prompt"]:
                continue  # of other rows
            if "initial" in run.examples[index] and run is runs[0]:
                lines.append(f"* *before training*: {literal(show(run.examples[index]['initial']))}")
            lines.append(f"* {name(run)}: {literal(show(run.examples[index]['average']))}")
        lines.append("")
    return "\n".join(lines)


def literal(text: str) -> str:
    """As it is, in one line of Markdown code: its line breaks as ⏎, with a fence that is longer than its own runs of backticks."""
    line = " ⏎ ".join(text.strip().splitlines())
    line = line if len(line) <= LONGEST_TEXT else f"{line[:LONGEST_TEXT]} ..."
    if not line:
        return "(nothing)"
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def estimate(result: Result, name: str) -> float | None:
    """The training's own, after its last iteration."""
    found = [row.get(f"constraints/{name}/estimate") for row in result.metrics]
    return next((value for value in reversed(found) if value is not None), None)


def certified(result: Result, name: str) -> str:
    """`12.3 [11.2, 13.4]`, of the certificate's own samples."""
    item = constraint(result, name)
    if item is None or item["mean"] is None:
        return "-"
    return f"{item['mean']:.3g} [{item['lower']:.3g}, {item['upper']:.3g}]"


def constraint(result: Result, name: str) -> dict[str, Any] | None:
    """What the certificate says of a constraint or monitor."""
    items = (result.certificate or {}).get("constraints") or []
    return next((item for item in items if item["name"] == name), None)


def interval(result: Result, name: str) -> tuple[float, float, float] | None:
    """(mean, lower, upper) of the certificate."""
    item = constraint(result, name)
    return None if item is None or item["mean"] is None else (item["mean"], item["lower"], item["upper"])


def share_below(result: Result, tokens: int) -> float:
    """Of the responses after training those of fewer tokens."""
    counts = result.summary["length"].get("histogram") or []
    return sum(counts[:tokens]) / max(sum(counts), 1)


def shown(name: str) -> str:
    return name.replace("_", " ")
