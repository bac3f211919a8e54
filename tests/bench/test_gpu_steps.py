"""What the run on a GPU measures, tiny and on a CPU: records that the results file takes, and a wrong gradient that is told."""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gpu_profile
import gpu_run
import gpu_steps

from l3ms.benchmark.parts import parts_of
from l3ms.benchmark.results import read
from l3ms.benchmark.shapes import GPU_FULL


def given(folder: Path, **changed) -> argparse.Namespace:
    usual = {
        "rehearse": True,
        "output": folder,
        "until": time.time() + 60,
        "rounds": 2,
        "first": 0,
        "without": "{}",
        "row_kernels": "auto",
    }
    return argparse.Namespace(**usual | changed)


def records(capsys) -> list[dict]:
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix(gpu_steps.MARK)) for line in lines if line.startswith(gpu_steps.MARK)]


def test_every_step_is_one():
    assert gpu_steps.MARK == gpu_run.MARK
    elsewhere = {"wheels", "build", "tests", "cluster", "profile", "memcheck", "ncu"}
    assert {step.name for step in gpu_run.STEPS} == gpu_steps.STEPS.keys() | elsewhere
    assert gpu_steps._cases(given(Path(), rehearse=False)) == GPU_FULL


def test_the_profile_names_what_the_time_goes_to(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py", "--rehearse"])
    gpu_profile.main()
    lines = capsys.readouterr().out.splitlines()
    ways = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert ways == ["cpp, workspace as it comes, in chunks", "cpp, workspace as it comes"]
    assert sum("weighted_log_likelihood" in line for line in lines) >= 2


def test_versions(tmp_path, capsys):
    assert gpu_steps.versions(given(tmp_path)) == 0
    (found,) = records(capsys)
    assert found["torch"]
    assert "capability" not in found or found["capability"][0].isdigit()


def test_without_a_device_a_run_stops(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_steps.torch.cuda, "is_available", lambda: False)
    assert gpu_steps.versions(given(tmp_path, rehearse=False)) == 1
    (found,) = records(capsys)
    assert "no CUDA device" in found["stop"]


def test_workspaces(tmp_path, capsys, monkeypatch):
    assert gpu_steps.workspaces(given(tmp_path)) == 0
    assert len(parts_of(records(capsys))) == 2
    monkeypatch.setattr(gpu_steps, "_backends", lambda given: ("reference", "eager"))
    monkeypatch.setattr("l3ms.benchmark.contestants.NEEDED", {"weighted": ("no such op",)})
    assert gpu_steps.workspaces(given(tmp_path)) == 1
    (part,) = parts_of(records(capsys))
    assert "does not implement no such op" in str(part.reason)


def test_products(tmp_path, capsys):
    assert gpu_steps.products(given(tmp_path)) == 0
    found = parts_of(records(capsys))
    assert [part.title for part in found[:6]] == [
        "NT, m=32", "NN, m=32", "NN in 16 bits, m=32", "TN, beta 0, m=32", "TN, beta 1, m=32", "TN in 16 bits, m=32",
    ]  # fmt: skip
    assert len(found) == 12
    for part, rows in zip(found, [32] * 6 + [64] * 6, strict=True):
        assert len(part.seconds) == gpu_steps.ROUNDS
        assert part.flops == 2 * rows * 48 * 320


def test_smoke_tells_right_from_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_steps, "_backends", lambda given: ("reference",))
    assert gpu_steps.smoke(given(tmp_path)) == 0
    assert [record["good"] for record in records(capsys)] == [True] * 4
    monkeypatch.setattr(gpu_steps, "ALLOWED", dict.fromkeys(gpu_steps.ALLOWED, 1e-12))
    assert gpu_steps.smoke(given(tmp_path)) == 1
    assert not any(record["good"] for record in records(capsys))
    monkeypatch.setattr(gpu_steps, "_backends", lambda given: ("cuda",))
    assert gpu_steps.smoke(given(tmp_path)) == 1
    assert all("backend 'cuda' cannot be used" in record["reason"] for record in records(capsys))


def test_a_row_kernel_that_is_not_there_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_steps, "timed", lambda *arguments: 1 // 0)
    assert gpu_steps.row_kernel(given(tmp_path)) == 1
    assert all("ZeroDivisionError" in str(part.reason) for part in parts_of(records(capsys)))


def test_the_race_writes_what_the_readme_reads(tmp_path, capsys):
    """With who was left out before, and the reason; then the parts are entered."""
    why, chosen = "ended: silent for 75 s, at work on case 0", "reference,eager,trl"
    out = json.dumps({"trl": why})
    assert gpu_steps.race(given(tmp_path, first=1, without=out, contestants=chosen)) == 0
    said = [record for record in records(capsys) if "at" in record]
    assert {record["at"] for record in said} == {1}
    assert "eager" in {record["contestant"] for record in said}
    (path,) = tmp_path.glob("*.json")
    (case,) = read(path).cases
    left_out = case.find("trl")
    assert left_out is not None
    assert left_out.reason == why
    assert case.find("reference").median  # pyright: ignore[reportOptionalMemberAccess]
    part = {"step": "products", "group": "products", "title": "NT", "seconds": [0.5], "flops": 1e12}
    (tmp_path / "run.json").write_text(json.dumps({"records": [part, {"smoke": "cuda"}]}))
    assert gpu_steps.results(given(tmp_path)) == 0
    found = read(path)
    assert [entered.title for entered in found.parts] == ["NT"]
    assert len(found.cases) == 1
    assert "| NT | 500 ms | 2 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").exists()
    assert "to keep it: cp " in capsys.readouterr().out


def test_calls_that_warm_up_are_not_counted():
    calls = []
    found = gpu_steps.timed(lambda: calls.append("run"), "cpu", 3, lambda: calls.append("before"))
    assert calls == ["before", "run"] * 5
    assert len(found) == 3
