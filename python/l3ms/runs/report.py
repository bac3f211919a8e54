"""What a run leaves to look at: `report.json`, `report.png`, and the tables in the terminal.

A report holds `seed`, `seconds`, `bounds {min, max}` of the length, `constraints [{name, type, min, max, threshold, quantile}]`,
`skipped_steps`, `mu_end`, `time` (see `training.phase_summary.summary`), and per model (`sft` or `initial`, `last`, `average`) a summary
`{"length": {"mean", "ci95", "p5", "p50", "p95"}, "ended", "perplexity", "samples", "constraints": {name: {"mean", "ci95", "samples"}}}`,
the constraint on the mean length with `"single_answers": {"below", "short", "cut"}`. The picture is drawn from
`metrics.jsonl` (one object per iteration) and `report.json` alone, so `l3ms plot` can draw it again at any time.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from l3ms.config.yaml_reader import ConfigError, read_yaml
from l3ms.constraints.shares import bounds_of
from l3ms.constraints.single_answers import LARGE, SingleAnswers
from l3ms.regular_files import read_regular
from l3ms.runs.labels import MODELS, constraint_label, is_mean_length, model_label, wanted_text
from l3ms.runs.whole_files import finite, write_json, write_whole


def write_report(
    folder: str | Path, report: Mapping[str, Any], lengths: Mapping[str, Iterable[int]] | None = None
) -> Path:
    """Write `report.json` and draw `report.png` in `folder`; returns the picture's path.

    `lengths` maps a model's key ("sft", "average", ...) to the token counts of its sampled responses; they are kept in
    the report as `length.histogram`, a list whose entry n is the number of responses of n tokens.
    """
    folder = Path(folder)
    written = finite(report)
    for key, values in (lengths or {}).items():
        written.setdefault(key, {}).setdefault("length", {})["histogram"] = histogram(values)
    write_json(folder / "report.json", written)
    return plot_run(folder)


def histogram(lengths: Iterable[int]) -> list[int]:
    """`[number of responses of 0 tokens, of 1 token, ...]`, up to the longest."""
    values = [int(length) for length in lengths]
    counts = [0] * (max(values, default=-1) + 1)
    for value in values:
        counts[value] += 1
    return counts


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The iterations of a `metrics.jsonl`; a torn last line (a killed run) is left out."""
    rows = []
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ConfigError(str(path), f"line {number} is not JSON") from None
            continue
        if not isinstance(row, dict):
            raise ConfigError(str(path), f"line {number} must be an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def read_report(folder: Path) -> dict[str, Any]:
    """`report.json`. Raises `ConfigError` naming it, `FileNotFoundError` where there is none."""
    path = folder / "report.json"
    try:
        report = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(str(path), f"is not JSON: {error.msg} at line {error.lineno}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(path), "is not JSON that can be read") from None
    if not isinstance(report, dict):
        raise ConfigError(str(path), f"must be an object, got {type(report).__name__}")
    return report


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(str(path), "is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(ascii(str(path))[1:-1], f"cannot be read: {error.strerror}") from None


def plot_run(folder: str | Path) -> Path:
    """Draw `report.png` from the folder's `metrics.jsonl` and `report.json` (an interrupted run has no report yet).

    An optional `sft.jsonl` adds the baseline's task loss. Raises `ConfigError` when there is nothing to draw.
    """
    from l3ms.runs.figure import draw

    folder = Path(folder)
    try:
        metrics = read_metrics(folder / "metrics.jsonl")
    except FileNotFoundError:
        raise ConfigError(str(folder), "is not a run folder: it has no metrics.jsonl") from None
    if not metrics:
        raise ConfigError(str(folder / "metrics.jsonl"), "holds no iterations yet")
    try:
        report = read_report(folder)
    except FileNotFoundError:
        report = _configured(folder / "config.yaml")
    baseline = read_metrics(folder / "sft.jsonl") if (folder / "sft.jsonl").exists() else []
    picture = io.BytesIO()
    try:
        draw(metrics, report, baseline).savefig(picture, dpi=100, format="png")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, ZeroDivisionError) as error:
        what = f"cannot be drawn: {type(error).__name__}: {error}"
        raise ConfigError(f"{folder / 'metrics.jsonl'} or report.json", what) from error
    write_whole(folder / "report.png", picture.getvalue())
    return folder / "report.png"


def _configured(path: Path) -> dict[str, Any]:
    """What the picture of a run that did not end needs of its configuration: the solver, and `{name, min, max, ...}` of the constraints."""
    values = read_yaml(path) if path.exists() else {}
    keys = ("name", "type", "min", "max", "threshold", "quantile", "relative")
    try:
        items = [{key: item.get(key) for key in keys} for item in values.get("constraints") or []]
        solver = (values.get("train") or {}).get("solver")
    except (TypeError, AttributeError):
        raise ConfigError(str(path), "is no configuration of a run") from None
    length = next((item for item in items if item["name"] and is_mean_length(item)), {})
    bounds = {"min": length.get("min"), "max": length.get("max")}
    return {"constraints": items, "bounds": bounds, "solver": solver}


def summary_table(report: Mapping[str, Any]) -> Group:
    """The models of a report side by side: length with its 95% interval, percentiles, share ended, task perplexity.

    Below it a table of the constraints on anything else: a row each, a column for each model. Side by side they would be cut off where
    the terminal is narrow.
    """
    items = report.get("constraints") or []
    shown = next((item for item in items if is_mean_length(item)), None)  # in the columns of the length
    others = [item for item in items if item is not shown]
    return Group(_models_table(report), *([_constraints_table(report, others)] if others else []))


def _table(**options: Any) -> Table:
    style: Any = {"title_style": "bold", "header_style": "bold", "title_justify": "left", "caption_justify": "left"}
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, **style, **options)


def _models_table(report: Mapping[str, Any]) -> Table:
    table = _table(title=Text(_title(report)))
    table.add_column("model", no_wrap=True)
    for heading in ("length", "95% interval", "p5", "p50", "p95", "ended", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    bounds = report.get("bounds") or {}
    for key in _models(report):
        summary = report[key]
        length = summary["length"]
        low, high = length.get("ci95") or (None, None)
        table.add_row(
            Text(model_label(key, report)),
            _coloured(f"{length['mean']:.2f}", _inside(length["mean"], bounds)),
            _interval(low, high),
            *(f"{length[name]:.0f}" for name in ("p5", "p50", "p95")),
            f"{100 * summary['ended']:.1f}%",
            _number(summary.get("perplexity"), ".3f"),
        )
    samples = next((report[key]["samples"] for key in _models(report)), None)
    if samples:
        table.caption = (
            f"{samples} fresh samples on held-out prompts; mean length and percentiles in tokens"
            + _single_answers(report)
        )
    return table


def _single_answers(report: Mapping[str, Any]) -> str:
    """What the model that is handed out does under a bound on its mean length, where that is worth a word."""
    found = (report.get("average") or {}).get("constraints") or {}
    single = [SingleAnswers(**item["single_answers"]) for item in found.values() if "single_answers" in (item or {})]
    return "".join(
        f"\nof single answers, {model_label('average', report)}, {item.text()}"
        for item in single
        if max(item.short, item.cut) > LARGE
    )


def _constraints_table(report: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> Table:
    """Mean of each constraint's values on fresh samples, and half of its 95% interval."""
    keys = _models(report)
    table = _table()
    table.add_column("constraint", overflow="fold")
    table.add_column("wanted")
    for key in keys:
        table.add_column(Text(model_label(key, report)), justify="right")
    for item in items:
        found = [(report[key].get("constraints") or {}).get(item["name"]) or {} for key in keys]
        bounds: dict[str, Any] = dict(zip(("min", "max"), bounds_of(item), strict=True))
        cells = [_coloured(_mean(values), _inside(values.get("mean"), bounds)) for values in found]
        table.add_row(Text(constraint_label(item)), Text(wanted_text(item) or "-"), *cells)
    return table


def examples_table(examples: Iterable[Mapping[str, str]], report: Mapping[str, Any] | None = None) -> Table:
    """Responses to the same prompts side by side: `{"prompt", <model key>: response, ...}` per example.

    `report` says by which solver the models were made: those of plain fine-tuning are not called L3M.
    """
    rows = list(examples)
    keys = [key for key in MODELS if any(key in row for row in rows)]
    table = Table(title="Examples", title_style="bold", header_style="bold", show_lines=True, title_justify="left")
    for heading in ("prompt", *(model_label(key, report) for key in keys)):
        table.add_column(Text(heading), overflow="fold", ratio=1)
    for row in rows:
        table.add_row(*(Text(_clip(row.get(key, ""))) for key in ("prompt", *keys)))
    return table


def _title(report: Mapping[str, Any]) -> str:
    constraints = report.get("constraints") or [{"name": "length", **(report.get("bounds") or {})}]
    bounds = {constraint_label(item): wanted_text(item) for item in constraints}
    wanted = [f"{name} {text}" for name, text in bounds.items() if text]
    return f"Wanted: {', '.join(wanted) or 'the task alone'}"


def _models(report: Mapping[str, Any]) -> list[str]:
    return [key for key in MODELS if report.get(key)]


def _inside(value: float | None, bounds: Mapping[str, Any]) -> bool | None:
    low, high = bounds.get("min"), bounds.get("max")
    if value is None or (low is None and high is None):
        return None
    return (low is None or value >= low) and (high is None or value <= high)


def _coloured(text: str, inside: bool | None) -> Text:
    return Text(text, style={True: "green", False: "red", None: ""}[inside])


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None or not math.isfinite(high - low):  # of one sample
        return "-"
    form = ".2f" if high < 100 else ".1f"
    return f"{low:{form}} to {high:{form}}"


def _mean(values: Mapping[str, Any]) -> str:
    mean, interval = values.get("mean"), values.get("ci95")
    if mean is None:
        return "-"
    half = "" if not interval else f" ± {(interval[1] - interval[0]) / 2:.2g}"
    return f"{mean:.4g}{half}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _clip(text: str, limit: int = 400) -> str:
    """For the terminal: not too long, and without the control characters (escape sequences) a model may have produced."""
    text = "".join(letter if letter.isprintable() or letter == "\n" else "·" for letter in text[:limit])
    return text if len(text) < limit else f"{text[: limit - 1]}…"
