"""What a benchmark writes and shows, from results made up here; docs/benchmarks.md has the tables that the committed JSON gives."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from l3ms.benchmark.environment import Environment, cpu_name, describe, machine
from l3ms.benchmark.figure import groups, save
from l3ms.benchmark.page import BEGIN, END, NOT_MEASURED, rewrite, section
from l3ms.benchmark.results import CaseResult, Measurement, Part, Results, Scaling, ScalingPoint, read, write
from l3ms.benchmark.tables import bytes_text, case_grid, grids, markdown, report, scaling_grid, seconds_text
from l3ms.config.yaml_reader import ConfigError

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = Environment(
    date="2026-01-02T03:04:05+00:00", cpu="Fast(R) CPU @ 2GHz", isa=["avx2", "amx_bf16"], cores=2, memory_gib=8.0,
    system="Linux x86_64", python="3.11", torch="2.13", l3m_kernels="0.1.0", backends={"reference": "available"},
    packages={"liger-kernel": "0.8.5"},
)  # fmt: skip


def case(dtype: str = "bf16", masked: float = 0.0, op: str = "weighted") -> CaseResult:
    measurements = [
        Measurement(contestant="cpp", title="ours", kind="ours", seconds=[2.0, 1.0, 9.0], error=1e-3, memory=64 << 20),
        Measurement(contestant="eager", title="eager", kind="peer", seconds=[3.0, 5.0], error=2e-3, memory=3 << 30),
        Measurement(
            contestant="sum", title="sum", kind="peer", uniform=True, seconds=[1.0], memory_reason="took too long"
        ),
        Measurement(contestant="gone", title="gone", kind="peer", reason="needs a GPU | or two"),
        Measurement(contestant="products", title="products", kind="limit", seconds=[0.5]),
    ]
    return CaseResult(
        op=op, rows=10, hidden=20, vocabulary=30, sequences=2, dtype=dtype, masked=masked, scored=10, nll=1.5,
        flops=4e9, ours="cpp", measurements=measurements,
    )  # fmt: skip


def results(*cases: CaseResult) -> Results:
    points = [ScalingPoint(size=n, contestant="cpp", title="ours", seconds=[n / 1000]) for n in (256, 512)]
    steps = [ScalingPoint(size=k, contestant="cpp", title="step", seconds=[1 + k / 100]) for k in (1, 8)]
    common = {"hidden": 20, "vocabulary": 30, "dtype": "bf16"}
    return Results(
        environment=ENVIRONMENT, threads=2, rounds=3, seed=0, cases=list(cases),
        scaling=[Scaling(over="rows", points=points, **common), Scaling(over="constraints", rows=9, points=steps, **common)],
        parts=[
            Part(group="products", title="NT", seconds=[0.002, 0.001, 0.009], flops=1e12, bytes=4e9),
            Part(group="products", title="NN", seconds=[0.004], flops=1e12),
            Part(group="products", title="TN", reason="out of memory"),
            Part(group="workspaces", title="1 GiB", seconds=[0.5], memory=1 << 30),
        ],
    )  # fmt: skip


def test_ratios_refer_to_the_medians_of_ours():
    found = case()
    ours, eager, _, gone, _ = found.measurements
    assert ours.median == 2.0
    assert eager.median == 4.0
    assert [found.ratio(item) for item in found.measurements] == [1.0, 2.0, 0.5, None, 0.25]
    assert [found.gflops(item) for item in (ours, eager, gone)] == [2.0, 1.0, None]
    found.ours = "gone"
    assert found.ratio(eager) is None


def test_round_trip(tmp_path):
    written = results(case(), case(masked=0.4), case("fp32"))
    path = write(written, tmp_path / "new" / "a.json")
    assert read(path) == written
    values = json.loads(path.read_text())
    assert values["version"] == 1
    assert values["environment"]["isa"] == ["avx2", "amx_bf16"]
    assert values["cases"][0]["measurements"][0]["seconds"] == [2.0, 1.0, 9.0]
    assert [item.name for item in path.parent.iterdir()] == ["a.json"]


def test_files_that_are_no_results(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "gone.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a results file"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({**asdict(results()), "version": 2}))
    with pytest.raises(ConfigError, match=r"is not a results file: version"):
        read(tmp_path / "a.json")


def test_a_case_measured_again_takes_the_place_of_the_first():
    found = results(case(), case("fp32"))
    again = case()
    again.nll = 9.0
    found.add(again)
    assert [(item.dtype, item.nll) for item in found.cases] == [("fp32", 1.5), ("bf16", 9.0)]


def test_environment_describes_this_machine():
    found = describe()
    assert found.cpu == cpu_name()
    assert found.cores >= 1
    assert found.backends["reference"] == "available"
    assert found.same_software(replace(found, date="another"))
    assert not found.same_software(replace(found, torch="another"))
    assert ENVIRONMENT.device == "fast-cpu-2ghz-amx-bf16-2-cores"
    assert replace(ENVIRONMENT, isa=["avx2"], cores=1).device == "fast-cpu-2ghz-avx2-1-core"
    assert replace(ENVIRONMENT, cpu="", isa=[]).device == "cpu-2-cores"
    assert replace(ENVIRONMENT, gpu="NVIDIA H200").device == "nvidia-h200"
    assert re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", machine().lower())).strip("-") == found.device


def test_table_of_a_case():
    grid = case_grid(case())
    assert grid.header == ["", "time", "time / ours", "GFLOP/s", "memory", "error"]
    assert grid.rows == [
        ["ours", "2.00 s", "1.00", "2", "64 MiB", "1e-03"],
        ["eager", "4.00 s", "2.00", "1", "3.00 GiB", "2e-03"],
        ["sum *", "1.00 s", "0.50", "4", "-", "-"],
        ["products", "500 ms", "0.25", "8", "-", "-"],
    ]
    assert grid.best == 0
    notes = "\n".join(grid.notes)
    for words in ("nll of the targets 1.50", "not run: gone: needs a GPU", "* one weight", "memory not measured: sum"):
        assert words in notes
    lines = markdown(grid).splitlines()
    assert lines[1] == "|---|---:|---:|---:|---:|---:|"
    assert lines[2].startswith("| **ours** | **2.00 s** |")
    assert lines[4].startswith("| sum \\* |")


def test_units():
    assert [seconds_text(value) for value in (None, 123.4, 1.0, 0.0456, 7.89e-4)] == [
        "-", "123 s", "1.00 s", "45.6 ms", "789 µs",
    ]  # fmt: skip
    assert [bytes_text(value) for value in (None, 0, 64 << 20, 5 << 29)] == ["-", "0 MiB", "64 MiB", "2.50 GiB"]


def test_tables_of_scaling():
    rows, constraints = map(scaling_grid, results().scaling)
    assert rows.rows == [["256", "256 ms", "1.00 ms"], ["512", "512 ms", "1.00 ms"]]
    assert constraints.header == ["constraints", "step", "/ 1 constraint"]
    assert [row[2] for row in constraints.rows] == ["1.000", "1.069"]


def test_tables_of_parts():
    products, workspaces = grids(results())[-2:]
    assert products.header == ["", "time", "TFLOP/s", "GB/s"]
    assert products.rows == [["NT", "2.00 ms", "500", "2000"], ["NN", "4.00 ms", "250", "-"]]
    assert products.notes == ["not run: TN: out of memory"]
    assert workspaces.header == ["", "time", "memory"]
    assert workspaces.rows == [["1 GiB", "500 ms", "1.00 GiB"]]


def test_report_and_picture(tmp_path):
    found = results(case(), case(masked=0.4), case("fp32"), case(op="frozen"))
    text = report(found)
    assert text.startswith("# Benchmark: Fast(R) CPU")
    assert text.count("\n## ") == 8
    assert "not run: gone: needs a GPU \\| or two" in text
    assert [len(cases) for cases in groups(found).values()] == [2, 1, 1]
    picture = save(found, tmp_path / "a.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_section_of_the_page(tmp_path):
    text = section([results(case("fp32"), case(masked=0.4), case(), case(op="frozen"))])
    assert (
        "| | bf16, all scored | bf16, 40% unscored | fp32, all scored | memory, bf16 | memory, fp32 |"
        in text.replace("|  |", "| |")
    )
    assert "| **ours** | **2.00 s (1.00)** |" in text
    assert "| eager | 4.00 s (2.00) |" in text
    assert "not run: gone: needs a GPU" in text
    assert "25% in bf16 with 0% unscored" in text
    assert "bench/results/fast-cpu-2ghz-amx-bf16-2-cores.md" in text
    page = tmp_path / "benchmarks.md"
    page.write_text(f"a\n\n{BEGIN}\nold\n{END}\n\nb\n")
    assert rewrite(page, [results(case())])
    assert not rewrite(page, [results(case())])
    assert page.read_text().startswith(f"a\n\n{BEGIN}\n`weighted_log_likelihood`")
    assert rewrite(page, [])
    assert page.read_text() == f"a\n\n{BEGIN}\n{NOT_MEASURED}\n{END}\n\nb\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no <!-- benchmark"):
        rewrite(page, [])


def test_the_page_says_what_the_committed_results_say():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = text.partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]
    committed = [read(path) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    assert shown == section(committed), "python bench/update_page.py"
    for found in committed:
        assert (ROOT / "bench" / "results" / f"{found.name}.md").read_text(encoding="utf-8") == report(found)
    if not committed:
        pytest.skip("no results are committed yet: the page says so")
