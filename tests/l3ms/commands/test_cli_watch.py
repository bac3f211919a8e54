"""`watch:` of `l3ms train` as a user would set it, and set it wrong."""

import json

import pytest
from cli_projects import l3ms, losses


def test_a_watched_run_says_why_and_where_it_stopped(project, capsys):
    """With next to nothing allowed, distinct-2 or the EOS rate falls too far in one of the next iterations."""
    allowed = ("--watch.distinct-2-fall", 0.001, "--watch.ended-fall", 0.001, "--watch.window", 2)
    assert l3ms(project / "run.yaml", "--iterations", 12, "--watch.on-trip", "stop", *allowed) == 0, (
        capsys.readouterr().err
    )
    report = json.loads((project / "out/report.json").read_text())
    assert {item["rule"] for item in report["tripped"]} & {"distinct-2 fell", "EOS rate fell"}
    assert {item["action"] for item in report["tripped"]} == {"stop"}
    assert {item["iteration"] for item in report["tripped"]} == {report["iterations"]}
    assert report["iterations"] == len(losses(project / "out")) < 12
    assert report["conflicts"] == []
    row = json.loads((project / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert {"watch/ended", "watch/truncated", "watch/distinct_2", "watch/length/p50"} <= set(row)
    assert (project / "out/average").is_dir()


def test_a_run_that_is_not_watched_says_nothing_of_it(project, capsys):
    assert l3ms(project / "run.yaml", "--iterations", 2, "--watch", "null") == 0, capsys.readouterr().err
    assert "tripped" not in json.loads((project / "out/report.json").read_text())
    assert "watch/" not in (project / "out/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--watch.on-trip", "panic", "watch.on_trip"),
        ("--watch.truncated-max", 2, "watch.truncated_max"),
        ("--watch.on-tripp", "stop", "did you mean on_trip?"),
        ("--watch", "[1]", "watch: must be a section"),
    ],
)
def test_a_wrong_watch_is_one_line_and_nothing_is_written(project, capsys, flag, value, words):
    assert l3ms(project / "run.yaml", flag, value) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not (project / "out").exists()
