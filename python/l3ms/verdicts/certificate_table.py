"""A certificate in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from l3ms.constraints.constraint import Constraint
from l3ms.constraints.shares import quantile_text
from l3ms.constraints.single_answers import LARGE, SingleAnswers, bounds_to_add, open_sides
from l3ms.runs.labels import constraint_label, wanted_text
from l3ms.runs.terminal import say
from l3ms.verdicts.certificates import Verdict
from l3ms.verdicts.prices import Prices

COLOURS = {"SATISFIED": "green", "VIOLATED": "red", "INCONCLUSIVE": "yellow"}
METHODS = {"exact": "Clopper-Pearson", "bernstein": "empirical Bernstein", "t": "Student t"}


def print_certificate(
    certificate: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    constraints: Sequence[Constraint],
    prices: Prices | None,
    console: Console,
) -> None:
    """The table of verdicts, what limits them, and the prices."""
    console.print(verdict_table(certificate, verdicts, constraints))
    used_up = 1 < certificate["prompts"] >= certificate["held_out_prompts"]
    for verdict, item in zip(verdicts, constraints, strict=True):
        for line in remarks(verdict, used_up=used_up, data=item.data):
            say(console, f"{verdict.name}: {line}")
    said = [line for item in constraints for line in of_lengths(certificate, item, constraints)]
    for line in said:
        say(console, line)
    cut = 1 - certificate["ended"]
    if cut > 0 and not any("single_answers" in item for item in certificate["constraints"]):
        say(
            console,
            f"{100 * cut:.3g}% of the responses were cut at {certificate['max_new_tokens']} tokens; they do not count as ended.",
        )
    if prices is not None:
        console.print(price_table(prices))
        for line in prices.sentences():
            say(console, line)


def verdict_table(
    certificate: Mapping[str, Any], verdicts: Sequence[Verdict], constraints: Sequence[Constraint]
) -> Table:
    style: Any = {"title_style": "bold", "header_style": "bold", "title_justify": "left", "caption_justify": "left"}
    word = certificate["verdict"]
    table = Table(title=f"[{COLOURS[word]}]{word}[/]", box=box.SIMPLE_HEAD, pad_edge=False, **style)
    for heading, width in (("constraint", 10), ("wanted", 6)):  # folded where a terminal is narrow, and never left out
        table.add_column(heading, overflow="fold", min_width=width)
    for heading in ("mean", "at least", "at most", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bounds by", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for verdict, item in zip(verdicts, constraints, strict=True):
        table.add_row(
            escape(constraint_label(vars(item))),
            escape(wanted_text(vars(item))),
            *(number(value) for value in (verdict.mean, verdict.lower, verdict.upper)),
            str(verdict.groups),
            METHODS[verdict.method],
            "[dim]monitor[/]" if verdict.verdict is None else f"[{COLOURS[verdict.verdict]}]{verdict.verdict}[/]",
        )
    table.caption = (
        f"{certificate['samples']} fresh responses to {certificate['prompts']} held-out prompts, {certificate['weights']} weights; "
        f"no verdict is wrong with probability {1 - certificate['delta']:g} "
        f"({certificate['one_sided_bounds']} one-sided bounds at {certificate['level_of_each']:.4g} each)"
    )
    return table


def remarks(verdict: Verdict, *, used_up: bool, data: bool = False) -> list[str]:
    """What a reader has to know beside the row of the table; `used_up`: no held-out prompt is left to ask; `data`: it is of data of the
    constraint's own."""
    lines = [f"{METHODS[verdict.method]}: {verdict.why}"] if verdict.method == "t" and verdict.range else []
    for bound in verdict.bounds:
        if bound.verdict != "INCONCLUSIVE" or verdict.nonfinite:
            continue
        if bound.more is not None:
            unit = "samples" if verdict.groups == verdict.samples and not used_up else "different prompts"
            unit = "held-out rows in its own data, which --samples does not change" if data else unit
            lines.append(f"{bound.side} {bound.limit:g} is open: need about {bound.more} more {unit}")
        elif verdict.groups > 1 and math.isfinite(verdict.lower + verdict.upper):
            lines.append(
                f"{bound.side} {bound.limit:g} is open, and more samples would not settle it: the mean is at the bound"
            )
    return lines + verdict.notes


def of_lengths(certificate: Mapping[str, Any], constraint: Constraint, constraints: Sequence[Constraint]) -> list[str]:
    """What the fresh responses say of single answers where their mean is bounded, and the quantile where that is."""
    item = next(item for item in certificate["constraints"] if item["name"] == constraint.name)
    if "quantile_found" in item:
        quantile = quantile_text(item).partition(" ")[0]
        return [
            f"{constraint.name}: the {quantile} quantile of the fresh responses is {item['quantile_found']:g} tokens"
        ]
    if "single_answers" not in item:
        return []
    single = SingleAnswers(**item["single_answers"])
    short, cut = open_sides(constraint, constraints)
    short, cut = short and single.short > LARGE, cut and single.cut > LARGE
    line = f"{constraint.name}: of single answers {single.text(certificate['max_new_tokens'])}"
    if short or cut:
        line += (
            f"; the mean alone says nothing of them, bound them too: {bounds_to_add(constraint, short=short, cut=cut)}"
        )
    return [line]


def price_table(prices: Prices) -> Table:
    style: Any = {"title_style": "bold", "header_style": "bold", "title_justify": "left", "caption_justify": "left"}
    table = Table(title="Prices", box=box.SIMPLE_HEAD, pad_edge=False, **style)
    for heading in ("bound", "nats per unit", "standard error", "multiplier"):
        table.add_column(heading, justify="left" if heading == "bound" else "right")
    for price in prices.bounds:
        cells = (
            ("-", "-", "-") if price.inactive else (number(price.rate), number(price.stderr), number(price.multiplier))
        )
        table.add_row(
            escape(f"{price.share or price.name} {'>=' if price.side == 'min' else '<='} {price.limit:g}"), *cells
        )
    return table


def number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"
