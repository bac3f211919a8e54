"""The picture of a run: legends cover no data, each name stays what it is, and what was cut is marked."""

import math
from typing import Any

import numpy as np
import pytest

from l3ms.runs.figure import clipped, draw

LONG = "a_long_name_of_a_constraint_that_somebody_chose_0123456789.and_so"


def metrics(*names, count=30, bounded=True):
    for step in range(1, count + 1):
        row = {"iteration": step, "loss": 3.0 - step / count, "l3m/mu": 0.9**step, "l3m/noise_floor": 0.1}
        for name in names:
            row |= {f"constraints/{name}/estimate": 20 - step / 5, f"constraints/{name}/stderr": 0.4}
            row |= {f"constraints/{name}/lambda": 1e9 / step} if bounded else {}
        yield row


def items(*names, **bounds):
    return [{"name": name, "type": "length", "min": None, "max": None, "threshold": None, **bounds} for name in names]


def model(counts, ended, names=()):
    mean = float(np.average(range(len(counts)), weights=counts))
    length = {"mean": mean, "ci95": [mean - 1, mean + 1], "histogram": counts}
    return {"length": length, "ended": ended, "constraints": dict.fromkeys(names, length)}


def panel(figure, title) -> Any:
    return next(axes for axes in figure.axes if title in axes.get_title(loc="left"))


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


NAMES = {"one": ("length",), "five": ("length", "a", "b", "c", "d"), "long": (LONG, f"{LONG[:-1]}x")}


@pytest.mark.parametrize(("kind", "sampled"), [("one", False), *((kind, True) for kind in NAMES)])
def test_legends_are_beside_the_data_and_within_the_picture(kind, sampled):
    names = NAMES[kind]
    report = {"constraints": items(*names, min=12, max=16), "bounds": {"min": 12, "max": 16}, "average_from": 20}
    counts = [0, 5, 20, 60, 40, 20, 10, 5, 3, 2, 2, 2, 2, 2, 2, 2, 9]
    if sampled:
        report |= {key: model(counts, 0.95, names) for key in ("initial", "last", "average")}
    figure = draw(list(metrics(*names)), report)
    figure.canvas.draw()
    found: list[Any] = [axes for axes in figure.axes if axes.get_legend() is not None]
    assert len(found) >= len(names) + sampled
    titles = []
    for axes in found:
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1 - 1
        assert legend.x0 >= axes.get_window_extent().x0 - 1
        assert legend.x1 <= figure.bbox.x1
        title = axes._left_title.get_window_extent()
        assert title.y0 >= legend.y1 - 1
        titles.append(title)
        assert title.y1 <= figure.bbox.y1 + 1
        assert title.x1 <= figure.bbox.x1
    for first in titles:
        assert sum(first.overlaps(other) for other in titles) == 1  # itself


def test_the_bar_of_responses_that_were_cut_is_marked():
    natural, cut = [0, 10, 30, 40, 15, 5], [0, 10, 20, 20, 5, 5, 0, 40]
    figure = draw(list(metrics()), {"initial": model(natural, 1.0), "average": model(cut, 0.65), "bounds": {"max": 30}})
    axes = panel(figure, "Length of responses")
    assert labels(axes) == ["bounds on the mean", "before, mean 2.8", "L3M averaged, mean 4.3", "cut at 7"]
    (bar,) = axes.containers
    (patch,) = bar.patches
    assert (patch.get_x(), patch.get_hatch()) == (7, "////")
    assert patch.get_height() == pytest.approx(35)  # 5% of the responses ended at the 7th token


def test_nothing_is_marked_where_every_response_ended():
    figure = draw(list(metrics()), {"average": model([0, 10, 30, 40], 1.0)})
    axes = panel(figure, "Length of responses")
    assert labels(axes) == ["L3M averaged, mean 2.4"]
    assert not axes.containers


def test_a_name_is_no_formula_and_long_ones_are_short_in_a_legend():
    names = ("cost_$x$_and_$", LONG)
    figure = draw(list(metrics(*names)), {"constraints": items(*names, min=1, threshold=0.5)})
    assert panel(figure, names[0]).get_title(loc="left") == "cost_$x$_and_$ ≥ 0.5"
    texts = panel(figure, "Multiplier").get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["cost_$x$_and_$", "a_long_name_of_…123456789.and_so"]
    assert not any(text.get_parse_math() for text in texts)
    assert clipped("x" * 32, 32) == "x" * 32
    assert len(clipped("x" * 33, 32)) == 32


def test_each_of_several_multipliers_has_its_colour():
    names = NAMES["five"]
    axes = panel(draw(list(metrics(*names)), {"constraints": items(*names, min=1)}), "Multiplier")
    assert labels(axes) == list(names)
    assert len({line.get_color() for line in axes.lines}) == 5


def test_one_iteration_is_seen():
    report = {"constraints": items("length", min=12, max=16), "average": model([0, 10, 30], 1.0)}
    figure = draw(list(metrics("length", count=1)), report)
    for title in ("Mean response length", "Multiplier", "Barrier strength", "Task loss"):
        dots = [line for line in panel(figure, title).lines if line.get_marker() == "o" and len(line.get_xdata())]
        assert dots, title
    assert [tick for tick in panel(figure, "Task loss").get_xticks() if tick != int(tick)] == []


def test_values_between_gaps_are_seen():
    rows = [
        row | {"constraints/length/estimate": 20.0 if row["iteration"] in (3, 10, 11) else None}
        for row in metrics("length")
    ]
    axes = panel(draw(rows, {"constraints": items("length", min=12)}), "Mean response length")
    (dots,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert np.asarray(dots.get_xdata()).tolist() == [3]


def test_what_there_is_not_is_said():
    rows = [
        {"iteration": n, "loss": 1.0, "constraints/kl/estimate": 1.0, "constraints/kl/stderr": 0.1} for n in range(1, 4)
    ]
    figure = draw(rows, {"constraints": items("kl"), "solver": "none"})
    for title, words in (
        ("Multiplier", "nothing is constrained"),
        ("Gradient norms", "not logged"),
        ("Length", "no samples yet"),
    ):
        assert [text.get_text() for text in panel(figure, title).texts] == [words]
        assert not panel(figure, title).lines


def test_bounds_beyond_the_picture_are_in_words():
    axes = panel(draw(list(metrics("length")), {"constraints": items("length", max=2000)}), "Mean response length")
    assert "bounds: <= 2000" in labels(axes)
    assert axes.get_ylim()[1] < 100
    assert all(math.isfinite(limit) for limit in axes.get_ylim())


def test_samples_from_before_the_training_stand_before_it():
    names = ("length",)
    report = {
        "constraints": items(*names, min=1),
        **{key: model([0, 1, 2], 1.0, names) for key in ("initial", "average")},
    }
    axes = panel(draw(list(metrics(*names)), report), "Mean response length")
    points = [float(bar.lines[0].get_xdata()[0]) for bar in axes.containers]
    assert points[0] < 1 <= 30 < points[1]


def test_single_responses_are_a_band_behind_their_mean_alone():
    rows = [
        row | {"watch/length/p5": 2.0, "watch/length/p95": 50.0 + row["iteration"]} for row in metrics("length", "tail")
    ]
    mean, tail = items("length", min=12, max=16), items("tail", max=40, quantile=0.95)
    figure = draw(rows, {"constraints": [*mean, *tail]})
    axes = panel(figure, "Mean response length")
    assert "single responses, 5% to 95%" in labels(axes)
    below, above = axes.get_ylim()
    assert below < 2
    assert above > 60
    other = panel(figure, "tail ≤ 40 (95% quantile)")
    assert "single responses, 5% to 95%" not in labels(other)
    assert labels(other)[0] == "bounds: >= 0.95"
    assert other.get_ylabel() == "share of responses"
    assert "single responses, 5% to 95%" not in labels(
        panel(draw(list(metrics("length")), {"constraints": mean}), "Mean")
    )


def test_the_line_below_says_where_the_time_went():
    report = {"constraints": items("length", max=16)}
    timed = [row | {"time/iteration": 2.0, "time/sampling": 1.5, "time/task": 0.5} for row in metrics("length")]
    figures: list[Any] = [draw(rows, report) for rows in (timed, list(metrics("length")))]
    assert figures[0]._supxlabel.get_text() == "2 s per iteration: sampling 75%, task 25%"
    assert figures[1]._supxlabel is None  # of an earlier version
