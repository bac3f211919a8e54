"""A report is strict JSON, its picture can be drawn again from the folder alone, and the tables say what is in it."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.labels import bounds_text, is_mean_length
from l3ms.runs.progress import status
from l3ms.runs.report import examples_table, histogram, plot_run, read_metrics, summary_table, write_report


def summary(mean, **extra):
    length = {"mean": mean, "ci95": [mean - 0.5, mean + 0.5], "p5": 3.0, "p50": mean, "p95": 2 * mean}
    return {"length": length, "ended": 0.995, "perplexity": 12.3456, "samples": 64, **extra}


def report():
    models = {"sft": summary(23.0), "last": summary(14.0), "average": summary(14.2)}
    return {"seed": 0, "seconds": 1.5, "bounds": {"min": 12, "max": 16}, "skipped_steps": 0, "mu_end": 0.1, **models}


def rows(*names, count=30):
    for step in range(1, count + 1):
        row = {"iteration": step, "loss": 3.0 - step / count, "l3m/mu": 0.9**step}
        for name in names:
            values = {"estimate": 20 - step / 5, "stderr": 0.4, "lambda": 1 / step, "slack": 0.1}
            row |= {f"constraints/{name}/{key}": value for key, value in values.items()}
        yield row


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows("length")))
    return tmp_path


def shown(table, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def is_picture(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 20_000


def test_write_report_then_draw_again(folder):
    picture = write_report(folder, report(), {"sft": [20, 26, 23], "average": [13, 14, 15, 14]})
    assert is_picture(picture)
    written = json.loads((folder / "report.json").read_text())
    assert written["average"]["length"]["histogram"] == [0] * 13 + [1, 2, 1]
    assert written["bounds"] == {"min": 12, "max": 16}
    first = picture.read_bytes()
    picture.unlink()
    assert plot_run(folder).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.json", "report.png"]


def test_report_holds_no_nan(folder):
    write_report(folder, report() | {"mu_end": math.nan, "x": [math.inf, 1]})
    written = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["mu_end"] is None
    assert written["x"] == [None, 1]


@pytest.mark.parametrize("names", [(), ("length",), ("polite",), ("length", "polite", "short")])
def test_picture_of_any_number_of_constraints(tmp_path, names):
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(*names)))
    items = [{"name": name, "min": 1.0, "max": None} for name in names]
    assert is_picture(write_report(tmp_path, {"constraints": items}))


def test_picture_of_one_iteration_and_of_missing_values(tmp_path):
    row = {"iteration": 1, "loss": None, "constraints/length/estimate": 20.0, "constraints/length/stderr": None}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")
    assert is_picture(plot_run(tmp_path))


def test_interrupted_run_is_drawn_with_its_bounds(folder):
    (folder / "config.yaml").write_text("constraints: [{type: length, name: length, min: 12.0, max: null}]")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 31, "lo')
    assert len(read_metrics(folder / "metrics.jsonl")) == 30
    assert is_picture(plot_run(folder))


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no iterations"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('nonsense\n{"iteration": 1}\n')
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ConfigError, match=r"report\.json: is not JSON"):
        plot_run(tmp_path)


def test_tables():
    text = shown(summary_table(report()))
    for words in ("SFT", "L3M averaged", "14.20", "13.70 to 14.70", "99.5%", "12.346", "length in [12, 16]", "64 "):
        assert words in text
    polite = {"constraints": {"polite": {"mean": 0.81, "ci95": [0.8, 0.82]}}}
    more = {"average": summary(14.2, **polite), "constraints": [{"name": "polite", "min": 0.8, "max": None}]}
    assert "0.81" in shown(summary_table(more))
    text = shown(examples_table([{"prompt": "def f(x)", "sft": "A [bold]long[/bold] one", "average": "Short."}]))
    assert "A [bold]long[/bold] one" in text
    assert "\x1b]0;title" not in shown(examples_table([{"prompt": "x", "average": "\x1b]0;title\x07" + "y" * 999}]))


def item(name, kind="length", minimum=None, maximum=None, threshold=None):
    return {"name": name, "type": kind, "min": minimum, "max": maximum, "threshold": threshold}


def test_every_constraint_is_in_the_tables_however_narrow():
    items = [
        item("length", maximum=0.05, threshold=100), item("mean", minimum=12, maximum=16), item("second", maximum=20),
        item("kl", "kl", maximum=5), item("watched", "function"), item("unseen", "function", 1),
    ]  # fmt: skip
    means = {"length": 0.0311, "mean": 14.2, "second": 14.2, "kl": 7.25, "watched": 12.5}
    measured = {"constraints": {name: {"mean": mean, "ci95": [mean - 0.5, mean + 0.5]} for name, mean in means.items()}}
    found = {"initial": summary(14.2, **measured), "average": summary(14.2, **measured)}
    text = shown(summary_table({"constraints": items, "bounds": {"min": 12, "max": 16}, **found}), width=80)
    rows = [line.split() for line in text.splitlines()]
    assert ["P(length", ">=", "100)", "<=", "0.05", *["0.0311", "±", "0.5"] * 2] in rows
    assert ["second", "<=", "20", *["14.2", "±", "0.5"] * 2] in rows
    assert ["kl", "<=", "5", *["7.25", "±", "0.5"] * 2] in rows
    assert ["watched", "-", *["12.5", "±", "0.5"] * 2] in rows
    assert ["unseen", ">=", "1", "-", "-"] in rows
    assert not any(row[:1] == ["mean"] for row in rows)  # in the columns of the length
    assert "mean in [12, 16], second <= 20" in " ".join(text.split())
    assert "…" not in text


def test_names_with_markup_are_shown_as_they_are():
    names = ["[red]polite[/red]", "[/]", "a[b]\\", ":smile:"]
    values = {name: {"mean": 0.5, "ci95": [0.4, 0.6]} for name in names}
    text = shown(summary_table({"constraints": [item(name, "function", 1) for name in names],
                                "average": summary(3.0, constraints=values)}))  # fmt: skip
    for name in names:
        assert text.count(name) == 2  # wanted, and its row


def test_values_beyond_their_bounds_are_red():
    items = [item("length", minimum=12), item("kl", "kl", maximum=5)]
    values = {"kl": {"mean": 7.25, "ci95": [7, 7.5]}}
    table = summary_table({"constraints": items, "bounds": {"min": 12}, "average": summary(14.0, constraints=values)})
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    console.print(table)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert re.search(r"\x1b\[31m *7\.25 ± 0\.25\x1b", text)
    assert re.search(r"\x1b\[32m *14\.00\x1b", text)


def test_an_interval_of_one_sample_is_none():
    one = summary(14.0)
    for interval in ([-math.inf, math.inf], [None, None], None):
        one["length"]["ci95"] = interval
        rows = [line.split() for line in shown(summary_table({"average": one})).splitlines()]
        assert ["L3M", "averaged", "14.00", "-", "3", "14", "28", "99.5%", "12.346"] in rows


@pytest.mark.parametrize(
    ("solver", "word"), [("none", "SFT"), ("barrier", "L3M"), ("penalty", "penalty"), (None, "L3M")]
)
def test_examples_are_headed_by_the_solver(solver, word):
    text = shown(examples_table([{"prompt": "x", "initial": "y", "average": "z"}], {"solver": solver}))
    assert f"{word} averaged" in text
    assert ("L3M" in text) == (word == "L3M")


def test_a_share_of_lengths_is_not_the_mean_length():
    share = {"name": "length", "type": "length", "min": None, "max": 0.05, "threshold": 8.0}
    assert not is_mean_length(share)
    assert is_mean_length(share | {"threshold": None, "name": "short"})
    assert is_mean_length({"name": "length"})
    assert not is_mean_length({"name": "length", "type": "function"})
    measured = summary(11.7, constraints={"length": {"mean": 0.691, "ci95": [0.6, 0.8]}})
    assert "0.691" in shown(summary_table({"average": measured, "constraints": [share], "bounds": {}}))


def test_words():
    assert histogram([]) == []
    assert histogram([2, 0, 2]) == [1, 0, 2]
    assert (bounds_text(1, 2), bounds_text(1, None), bounds_text(None, 2.5)) == ("in [1, 2]", ">= 1", "<= 2.5")
    assert bounds_text(None, None) == ""
    logs = {"loss": 2.9134, "constraints/length/estimate": 18.31, "constraints/length/stderr": 0.3, "l3m/mu": 0.2111}
    text = status(logs, [{"name": "length", "min": 12, "max": 16}, {"name": "unseen", "min": 1, "max": 2}])
    assert text == "loss 2.913  length 18.3 ± 0.59 in [12, 16]  μ 0.21"


def test_a_quantile_is_shown_as_the_share_that_is_estimated():
    quantile = item("brief", minimum=4) | {"quantile": 0.05}
    values = {"brief": {"mean": 0.93, "ci95": [0.92, 0.94]}}
    report = {"constraints": [quantile], "average": summary(14.0, constraints=values)}
    text = " ".join(shown(summary_table(report), width=140).split())
    assert "Wanted: P(brief >= 4) >= 0.95 (5% quantile >= 4)" in text
    assert "P(brief >= 4) >= 0.95 (5% quantile >= 4) 0.93 ± 0.01" in text
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    console.print(summary_table(report))
    assert re.search(r"\x1b\[31m *0\.93", console.file.getvalue())  # pyright: ignore[reportAttributeAccessIssue]
    assert not is_mean_length(quantile)
    logs = {"constraints/brief/estimate": 0.931, "constraints/brief/stderr": 0.01}
    assert status(logs, [quantile]) == "P(brief >= 4) 0.931 ± 0.02 >= 0.95"


@pytest.mark.parametrize(("short", "cut", "said"), [(0.35, 0.06, True), (0.0, 0.06, True), (0.04, 0.05, False)])
def test_single_answers_are_told_of_where_they_are_many(short, cut, said):
    single = {"single_answers": {"below": 2.4, "short": short, "cut": cut}}
    values = {"length": {"mean": 14.0, "ci95": [13, 15], **single}, "gone": None}
    text = " ".join(shown(summary_table({"average": summary(14.0, constraints=values)}), width=140).split())
    line = f"of single answers, L3M averaged, {100 * short:.3g}% are below 2.4 tokens, a fifth of the bound, and 6% are cut"
    assert (line in text) == said
    assert ("single answers" in text) == said
