"""What a run on a GPU adds to the benchmark, as far as a machine without one can tell: arguments, budget, table, JSON, products."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from l3ms.benchmark import device, peers, race, run
from l3ms.benchmark.contestant import Contestant, Functions
from l3ms.benchmark.contestants import contestants, our_backends
from l3ms.benchmark.environment import describe
from l3ms.benchmark.inputs import exact_dtype
from l3ms.benchmark.race import TOLERANCE, Race
from l3ms.benchmark.results import CaseResult, Measurement, Results, read, write
from l3ms.benchmark.shapes import GPU_FULL, GPU_SHAPES, Case, Shape, select_cases
from l3ms.benchmark.tables import case_grid, machine, markdown, report
from l3ms.commands.command_line import main

SHAPE = Shape(64, 24, 300)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@NO_GPU
def test_without_a_gpu_the_command_says_so(capsys):
    assert main(["bench", "--device", "cuda", "--full"]) == 2
    assert "--device: cuda cannot be measured here: torch " in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "--device: must be cpu or cuda, got 'tpu'"),
        (("--device", "cuda", "--full", "--op", "frozen"), "--full: says which cases are measured; leave out --op"),
    ],
)
def test_options_that_are_none(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_cases_of_a_full_run():
    assert GPU_SHAPES[0] == (8192, 4096, 128256)
    assert len(GPU_SHAPES) == 4
    assert len(set(GPU_FULL)) == len(GPU_FULL)
    assert all(case.device == "cuda" for case in GPU_FULL)
    weighted = {(case.shape, case.masked) for case in GPU_FULL if case.op == "weighted"}
    assert weighted == {(shape, masked) for shape in GPU_SHAPES for masked in (0.0, 0.4)}
    assert select_cases([], [], [], [], "cuda") == GPU_FULL[:1]
    assert select_cases([], [], [], [])[0].device == "cpu"


def test_contestants_of_a_gpu():
    names = list(contestants("cuda"))
    assert our_backends("cuda") == ["cuda", "triton", "reference"]
    for name in (
        "cuda",
        "triton",
        "eager",
        "compile",
        "torch-chunked",
        "cce",
        "cce-exact",
        "liger-cross-entropy",
        "liger-cross-entropy-sm90",
        "liger-scaled-sm90",
        "quack",
    ):
        assert name in names
    assert "cpp" not in names


def test_a_peer_that_needs_a_gpu_says_so():
    """And backends of ours that are not there."""
    entries = Race(Case("weighted", SHAPE, "fp32", 0.0), contestants("cuda").values()).entries
    for name in ("cuda", "triton", "quack", "liger-cross-entropy-sm90", "liger-scaled-sm90"):
        assert entries[name].reason, name


def test_peers_for_hopper_are_called_as_they_are_written(monkeypatch):
    """Functions of the same arguments in their place: sums, signs and the ignored rows are those of the others."""

    class Whole:
        @staticmethod
        def apply(hidden, weight, targets, ignore_index, reduction):
            return F.cross_entropy(hidden @ weight.t(), targets, ignore_index=ignore_index, reduction=reduction)

    class Tokens:
        @staticmethod
        def apply(hidden, weight, targets, temperature, ignore_index):
            logits = hidden @ weight.t() / temperature
            return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")

    made: dict[str, tuple[str, type]] = {
        "fused_linear_cross_entropy_sm90": ("LigerFusedLinearCrossEntropySM90Function", Whole)
    }
    made["fused_scaled_cross_entropy_sm90"] = ("LigerFusedScaledCrossEntropySM90Function", Tokens)
    for module, (function, stand_in) in made.items():
        name = f"liger_kernel.ops.cutedsl.ops.{module}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{function: stand_in}))
    names = ("liger-cross-entropy-sm90", "liger-scaled-sm90")
    without = Race(Case("weighted", SHAPE, "bf16", 0.4), [contestants()[name] for name in names])
    assert all("compute capability 9" in str(entry.reason) for entry in without.entries.values())
    monkeypatch.setattr(peers, "_on_hopper", lambda case: None)
    race = Race(Case("weighted", SHAPE, "bf16", 0.4), [contestants()[name] for name in names])
    race.check()
    assert [entry.reason for entry in race.entries.values()] == [None, None]
    assert all(0 < (entry.error or 0) <= TOLERANCE["bf16"] for entry in race.entries.values())


@pytest.mark.parametrize("op", ["weighted", "log-likelihood", "frozen", "no-grad"])
def test_products_are_timed_apart(op):
    sizes = []

    def timed(function, argument) -> float:
        function(argument)
        sizes.append(1)
        return float(len(sizes))

    found = device.forms(Case(op, SHAPE, "fp32", 0.4), 3, timed)
    assert list(found) == {"no-grad": ["NT"], "frozen": ["NT", "NN"]}.get(op, ["NT", "NN", "TN"])
    assert found["NT"] == 2.0
    assert len(sizes) == 3 * len(found)


def waiting(name: str, seconds: float, compiled: bool = False) -> Contestant:
    def call(batch):
        time.sleep(seconds)
        return ()

    return Contestant(name, name, lambda case: Functions(run=call), "limit", compiled=compiled)


def test_who_does_not_fit_the_time_is_left_out_and_listed():
    case = Case("weighted", SHAPE, "fp32", 0.0)
    entrants = [waiting("compiles", 0.0, compiled=True), waiting("first", 1.1), waiting("second", 0.0)]
    found = Race(case, entrants, deadline=time.monotonic() + 1)
    found.check(exact=False)
    reasons = {name: entry.reason or "" for name, entry in found.entries.items()}
    assert reasons["first"] == ""
    assert "the time that was set for this case was up" in reasons["second"]
    assert "the time that was set for this case was up" in reasons["compiles"]
    found.time(50)
    assert len(found.entries["first"].seconds) == 1, "one round, and no more after the time is up"
    fits = Race(case, [waiting("compiles", 0.0, compiled=True)], deadline=time.monotonic() + 2 * race.COMPILE)
    fits.check(exact=False)
    assert fits.running == ["compiles"]


def test_a_budget_is_kept(tmp_path, capsys):
    """The cases share what is left; the JSON has those that were measured, whenever the time runs out."""
    path, shapes = tmp_path / "a.json", [("--shape", f"{rows},16,200") for rows in (64, 128, 256)]
    options = ("--dtype", "fp32", "--threads", "1", "--contestants", "reference,eager", "--no-memory", "--budget", "3")
    started = time.monotonic()
    arguments = [value for pair in shapes for value in pair]
    assert main(["bench", *arguments, *options, "--rounds", "2000000", "--json", str(path)]) == 0
    assert time.monotonic() - started < 10
    found = read(path)
    assert found.budget == 3
    assert 1 <= len(found.cases) <= 3
    assert all(item.seconds for case in found.cases for item in case.measurements)


def gpu_results() -> Results:
    items = [
        Measurement(contestant="cuda", title="ours", kind="ours", seconds=[0.030], error=1e-3, memory=1 << 29),
        Measurement(contestant="quack", title="QuACK", kind="peer", reason="not installed"),
    ]
    case = CaseResult(
        op="weighted", rows=10, hidden=20, vocabulary=30, sequences=2, dtype="bf16", masked=0.0, device="cuda", scored=10,
        nll=2.0, flops=2.4e13, ours="cuda", forms={"NT": 0.008, "NN": 0.008, "TN": 0.011}, measurements=items,
    )  # fmt: skip
    environment = replace(describe(), gpu="NVIDIA H200", cuda="13.0")
    return Results(environment=environment, threads=1, rounds=5, seed=0, budget=450, cases=[case])


def test_the_table_of_a_gpu(tmp_path):
    results = gpu_results()
    text = markdown(case_grid(results.cases[0]))
    assert "| TFLOP/s | of the products |" in text
    assert "| **800** | **90%** |" in text
    assert "bare products, TFLOP/s: NT 1000, NN 1000, TN 727" in case_grid(results.cases[0]).notes
    assert "not run: QuACK: not installed" in case_grid(results.cases[0]).notes
    assert results.environment.device == "nvidia-h200"
    assert machine(results).startswith("NVIDIA H200, CUDA 13.0, torch ")
    assert report(results).startswith("# Benchmark: NVIDIA H200\n")
    path = write(results, tmp_path / "a.json")
    assert read(path) == results
    assert read(path).cases[0].case == Case("weighted", Shape(10, 20, 30), "bf16", 0.0, "cuda")
    assert json.loads(path.read_text())["cases"][0]["forms"]["TN"] == 0.011


def test_files_of_before_are_read():
    """They say nothing of a device: it was a CPU."""
    root = Path(__file__).resolve().parents[3] / "bench" / "results"
    for path in root.glob("*.json"):
        found = read(path)
        assert found.environment.gpu is None or found.cases[0].device == "cuda"


def test_a_cpu_compares_with_float64_and_has_no_deadline():
    case = Case("weighted", SHAPE, "fp32", 0.0)
    assert exact_dtype(case) == torch.float64
    assert Race(case, []).deadline == math.inf
    assert run.Plan(cases=(case,)).device == "cpu"
