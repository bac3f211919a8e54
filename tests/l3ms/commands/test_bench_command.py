"""`l3ms bench` as a user would run it, and break it: bad input is one line that names the option, exit 2, nothing measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from l3ms.benchmark import run
from l3ms.benchmark.results import read
from l3ms.commands.command_line import main

ROOT = Path(__file__).resolve().parents[3]
TINY = ("--shape", "64,16,200", "--dtype", "fp32", "--rounds", "2", "--threads", "1")


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def test_a_run_writes_table_json_and_pictures(tmp_path, capsys):
    chosen = ("--contestants", "reference, eager,quack,products", "--no-memory", "--masked", 0, "--masked", 0.4)
    files = ("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--output", tmp_path / "out")
    assert bench(*TINY, *chosen, *files) == 0
    shown = capsys.readouterr().out
    for words in (
        "n=64 (64 scored)",
        "n=64 (38 scored)",
        "torch, logits held",
        "time / ours",
        "not run: QuACK",
        "torch 2.",
    ):
        assert words in shown
    found = read(tmp_path / "a.json")
    device = found.environment.device
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{device}{ending}" for ending in (".json", ".md", ".png")
    }
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [(item.masked, item.ours) for item in found.cases] == [(0.0, "reference"), (0.4, "reference")]
    assert [item.contestant for item in found.cases[0].measurements] == ["reference", "eager", "quack", "products"]
    assert all(len(item.seconds) == 2 for item in found.cases[0].measurements if not item.reason)
    assert (found.threads, found.rounds, found.seed) == (1, 2, 0)

    more = ("--contestants", "reference", "--no-memory", "--masked", 0.5, "--output", tmp_path / "out")
    assert bench(*TINY, *more, "--add") == 0
    assert [item.masked for item in read(tmp_path / "out" / f"{device}.json").cases] == [0.0, 0.4, 0.5]
    path = tmp_path / "out" / f"{device}.json"
    values = json.loads(path.read_text())
    values["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(values))
    capsys.readouterr()
    assert bench(*TINY, *more, "--add") == 2
    assert "l3ms: --add: " in capsys.readouterr().err


def test_scaling(tmp_path, capsys):
    assert bench("--scaling", *TINY, "--contestants", "reference,eager", "--json", tmp_path / "a.json") == 0
    shown = capsys.readouterr().out
    assert "Time over rows" in shown
    assert "Time over constraints, n=64" in shown
    rows, constraints = read(tmp_path / "a.json").scaling
    assert {point.size for point in rows.points} == {64}
    assert [point.size for point in constraints.points] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--shape", "64,16"), "--shape: must be n,D,V"),
        (("--shape", "64,16,-3"), "--shape: must be n,D,V"),
        (("--shape", "a,b,c"), "--shape: must be n,D,V"),
        (("--dtype", "fp8"), "--dtype: must be one of bf16, fp32, got 'fp8'"),
        (("--op", "forward"), "--op: must be one of weighted"),
        (("--masked", "1"), "--masked: must be a share of the rows"),
        (("--masked", "nan"), "--masked: must be a share of the rows"),
        (("--masked", "0.9", "--shape", "2,16,200"), "--masked: leaves none of 2 rows scored"),
        (("--masked", "much"), "--masked"),
        (("--contestants", "eager,nobody"), "--contestants: must be one of"),
        (("--backend", "fast"), "--backend: must be one of cpp, reference, got 'fast'"),
        (("--backend", "cuda"), "--backend: must be one of cpp, reference, got 'cuda'"),
        (("--rounds", "0"), "--rounds"),
        (("--seed", "-1"), "--seed"),
        (("--seed", str(2**70)), "--seed"),
        (("--full", "--dtype", "fp32"), "--full: says which cases are measured; leave out --dtype"),
        (("--full", "--scaling"), "--full: says which cases are measured; leave out --scaling"),
        (("--scaling", "--masked", "0.4"), "--scaling: measures weighted with all rows scored; leave out --masked"),
        (
            ("--scaling", "--plot", "a.png", "--budget", "9"),
            "--scaling: takes no --plot, --budget: those are of the cases",
        ),
        (("--scaling", "--no-memory"), "--scaling: takes no --no-memory"),
        (("--scaling", *("--shape", "64,8,64") * 2), "--shape: must be one with --scaling, got 64,8,64 and 64,8,64"),
        (("--scaling", "--dtype", "bf16", "--dtype", "fp32"), "--dtype: must be one with --scaling, got bf16 and fp32"),
        (("--add",), "--add: needs --output"),
        (("--plot", "a.pdf"), "--plot: must be a .png file, got a.pdf"),
        (("--plot", "gone/a.png"), "--plot: no such folder: gone"),
        (("--json", "a.txt"), "--json: must be a .json file"),
        (("--output", "file"), "--output: must be a folder"),
        (("extra",), "extra"),
    ],
)
def test_bad_input(arguments, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured"))
    assert bench(*arguments) == 2
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert found.err.startswith("l3ms: ")
    assert option in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_backend_that_cannot_run_the_op(monkeypatch, capsys):
    from dataclasses import replace

    import l3m_kernels

    report = l3m_kernels.backends()
    rows = tuple(replace(row, missing="no compiler") if row.name == "cpp" else row for row in report.backends)
    monkeypatch.setattr(run, "backends", lambda: replace(report, backends=rows))
    assert bench(*TINY, "--backend", "cpp") == 2
    assert "--backend: cpp cannot run weighted_log_likelihood here: no compiler" in capsys.readouterr().err


def test_interrupt_says_what_was_kept(tmp_path, monkeypatch, capsys):
    measure, calls = run.measure, []

    def stop_at_two(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(run, "measure", stop_at_two)
    more = ("--contestants", "reference", "--no-memory", "--masked", 0, "--masked", 0.4, "--json", tmp_path / "a.json")
    assert bench(*TINY, *more) == 130
    found = capsys.readouterr()
    assert "interrupted" in found.err
    assert f"kept: 1 cases in {tmp_path / 'a.json'}" in " ".join(found.out.split())
    assert len(read(tmp_path / "a.json").cases) == 1


@pytest.mark.slow
def test_suites_run():
    """Every suite of `bench/` on a tiny shape; pytest-benchmark is off below xdist, so this is a process of its own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--tiny",
        "--benchmark-only",
        "-q",
        "-k",
        "not bf16 and not V1 and not 40",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    for suite in ("weighted", "log_likelihood", "no_grad", "frozen", "barrier_weights"):
        assert f"test_{suite}[" in done.stdout
    assert "\nnot run: " in done.stdout  # peers that are not installed, or do something else


def test_a_folder_that_no_file_system_takes_is_refused_by_its_option(capsys):
    assert main(["bench", "--output", "x" * 3000]) == 2
    assert capsys.readouterr().err.startswith("l3ms: --output: cannot be a folder (File name too long): xxx")
