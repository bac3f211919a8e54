"""The count of what the head takes on a GPU: against numbers worked out by hand, its laws, its command, and the page that quotes it."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from l3m_kernels.chunk_sizes import chunk_rows
from l3m_kernels.gpu_rates import GPUS
from l3m_kernels.roofline import BEGIN, END, main, rewrite, section
from l3m_kernels.step_times import AFTER, BEFORE, Estimate, Problem, break_even, busy, chunks_of, estimate, limit

H200 = GPUS["h200"]
R = Problem(8192, 4096, 128256)
CHUNKED = replace(AFTER, gathers=False)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def step(found: Estimate, name: str):
    return next(step for step in found.steps if step.name == name)


@pytest.mark.parametrize(("products", "milliseconds"), [(1, 10.9), (2, 21.8), (3, 32.7), (4, 43.6)])
def test_the_products_of_shape_r(products, milliseconds):
    assert limit(R, H200, products) * 1e3 == pytest.approx(milliseconds, abs=0.05)


def test_the_limit_has_the_products_that_are_needed():
    assert limit(R, H200) == limit(R, H200, 3)
    assert limit(R._replace(frozen=True), H200) == limit(R, H200, 2)
    assert limit(R._replace(gradients=False), H200) == limit(R, H200, 1)


def test_rows_from_which_the_sum_hides_behind_its_product():
    """4 P / B of fp32 sums, half of that of 16-bit ones."""
    assert break_even(H200, "bf16", 2) == pytest.approx(367, abs=0.5)
    assert break_even(H200, "bf16", 4) == pytest.approx(735, abs=0.5)


def test_tiles():
    assert busy(768, 4096, 132) == pytest.approx(96 / 132)  # 6 x 16 tiles
    assert busy(1024, 4096, 132) == pytest.approx(128 / 132)
    assert busy(1536, 4096, 132) == pytest.approx(192 / 264)
    assert busy(64, 256, 1) == 0.5  # half of a tile


def test_shape_r_before_and_after():
    """By hand: 11 and 8 chunks; 10 and 6 bytes a logit at 4.3 TB/s; 8 D V bytes a chunk, half for the first; 6 + 4 and 6 bytes of D V."""
    before, after = estimate(R, H200, BEFORE), estimate(R, H200, CHUNKED)
    assert before.chunks == (*[768] * 10, 512)
    assert after.chunks == (1024,) * 8
    assert not after.gathered
    logits, matrix = 8192 * 128256, 4096 * 128256
    for found, element, traffic, closing in ((before, 10, 84, 10), (after, 6, 60, 6)):
        assert step(found, "row kernel").least == pytest.approx(element * logits / 4.3e12)
        assert step(found, "sum of TN").most == pytest.approx(traffic * matrix / 4.3e12)
        assert step(found, "closing passes").most == pytest.approx(closing * matrix / 4.3e12)
    assert step(after, "NN").most == pytest.approx(limit(R, H200, 1) * 132 / 128)
    assert before.share == pytest.approx((0.63, 0.89), abs=0.01)
    assert after.share == pytest.approx((0.76, 0.93), abs=0.01)
    assert before.largest_loss.name == after.largest_loss.name == "sum of TN"


def test_shape_r_gathered():
    """By hand: NN as in chunks, TN of all rows, 16,032 tiles in 122 waves; no sum and no pass at the end."""
    found = estimate(R, H200, AFTER)
    assert found.gathered
    assert found.chunks == (1024,) * 8
    assert {each.name for each in found.steps} == {"NT", "row kernel", "NN", "TN"}
    assert step(found, "NN").most == pytest.approx(limit(R, H200, 1) * 132 / 128)
    assert step(found, "TN").most == pytest.approx(limit(R, H200, 1) * 122 * 132 / 16032)
    assert found.held == 8192 * 2 * 128256 + 1024 * (4 * 128256 + 6 * 4096)
    assert found.share == pytest.approx((0.94, 0.95), abs=0.01)
    assert not estimate(R._replace(rows=16384), H200, AFTER).gathered


def test_one_chunk_has_no_sum_and_no_rounding():
    found = estimate(R._replace(rows=4096), H200)
    assert found.chunks == (4096,)
    assert {step.name for step in found.steps} == {"NT", "row kernel", "NN", "TN"}
    assert {step.name for step in estimate(R._replace(rows=768), H200, BEFORE).steps} > {"sum of TN", "closing passes"}


def test_fp16_has_no_sum_in_16_bits():
    """By hand: its power of two taken out of the fp32 sum (8 D V bytes), then scaled (8) and rounded (6), or both in one pass (6)."""
    problem, matrix = R._replace(rows=2048, dtype="fp16", workspace=4 << 30), 4096 * 128256
    for design, passes in ((BEFORE, 22), (AFTER, 14)):
        found = estimate(problem, H200, design)
        assert found.chunks == (2048,)
        assert step(found, "closing passes").bytes == passes * matrix
        assert step(found, "sum of TN").bytes == 4 * matrix


def test_a_product_of_few_tiles_writes_no_16_bit_sums():
    """128 tiles of V x D on 132 multiprocessors: cuBLAS may share a sum then, and round its parts."""
    found = estimate(Problem(512, 1024, 4096), H200)
    assert found.chunks == (512,)
    assert {"sum of TN", "closing passes"} <= {step.name for step in found.steps}
    assert {"sum of TN", "closing passes"}.isdisjoint(
        each.name for each in estimate(Problem(512, 4096, 32000), H200).steps
    )


def test_the_rule_of_chunks_is_the_backends_own(monkeypatch):
    asked = []

    def rule(*arguments, **options):
        asked.append((arguments, options))
        return 96

    monkeypatch.setattr("l3m_kernels.step_times.chunk_rows", rule)
    assert chunks_of(R._replace(rows=250), H200, AFTER) == (96, 96, 58)
    ((arguments, options),) = asked
    assert arguments == (250, 128256, 4096)
    assert options["multiprocessors"] == 132
    chunk_rows(*arguments, **options)


def test_a_product_of_few_rows_waits_for_memory():
    found = estimate(R._replace(rows=64), H200)
    assert step(found, "NT").most == pytest.approx((2 * 4096 * (64 + 128256) + 4 * 64 * 128256) / 4.3e12)
    assert "NT waits for memory" in step(found, "NT").why


@pytest.mark.parametrize("design", [BEFORE, AFTER], ids=lambda design: design.name)
@pytest.mark.parametrize("device", GPUS)
def test_more_rows_take_longer(device, design):
    """At one number of rows a chunk: where rows are dealt out to fewer chunks, more of them may take less."""
    sizes = [estimate(R._replace(rows=1024 * count), GPUS[device], design) for count in range(10, 20)]
    same = [found for found in sizes if found.chunks[0] == sizes[0].chunks[0]]
    assert len(same) > 2
    for one, other in itertools.pairwise(same):
        assert one.seconds[0] < other.seconds[0]
        assert one.seconds[1] < other.seconds[1]


def test_only_scored_rows_count():
    """Linear in them, whatever else is in the batch."""
    half = estimate(R._replace(rows=32768, masked=0.5), H200)
    assert half.steps == estimate(R._replace(rows=16384), H200).steps
    one, two = estimate(R, H200), half
    assert two.limit == pytest.approx(2 * one.limit)
    for name in ("NT", "NN", "TN", "row kernel"):
        assert step(two, name).most == pytest.approx(2 * step(one, name).most, rel=0.03)


def test_the_mends_and_faster_devices_never_cost():
    for shape in ((8192, 4096, 128256), (8192, 896, 151936), (8192, 4096, 32000), (100, 64, 1000)):
        before, after = (estimate(Problem(*shape), H200, design) for design in (BEFORE, AFTER))
        assert sum(after.seconds) <= sum(before.seconds)
        faster = estimate(Problem(*shape), H200.with_rates(2 * 790e12, 2 * 4.3e12), BEFORE)
        assert faster.seconds == pytest.approx(tuple(value / 2 for value in before.seconds))


def test_clusters_decide_how_often_a_row_is_read():
    assert step(estimate(R, GPUS["a100"]), "row kernel").bytes == 10 * 8192 * 128256
    for vocabulary, element in ((262144, 6), (262145, 10)):
        assert step(estimate(Problem(64, 16, vocabulary), H200), "row kernel").bytes == element * 64 * vocabulary
    assert step(estimate(R._replace(gradients=False), GPUS["a100"]), "row kernel").bytes == 4 * 8192 * 128256


@pytest.mark.parametrize("device", GPUS)
def test_every_number_has_its_source(device):
    lines = GPUS[device].sources()
    assert len(lines) == 6
    assert all(len(line.partition(": ")[2]) > 10 for line in lines)


def test_the_command(capsys):
    assert main(["8192", "4096", "128256", "64", "896", "151936", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    for words in (
        "NVIDIA H100", "of the 3.35 in NVIDIA's H100 datasheet", "limit 32.6 ms", "8 x 1024, gathered with the mends (2529 MiB)",
        "largest loss with the mends", "n=64 (64 scored), D=896", "share of the limit",
    ):  # fmt: skip
        assert words in out
    assert "3.02 TB/s" in out
    assert main(["8192", "4096", "128256", "--rate", "500", "--bandwidth", "2", "--masked", "0.5", "--frozen"]) == 0
    out = capsys.readouterr().out
    assert "500 TFLOP/s bf16: given by --rate" in out
    assert "2 TB/s: given by --bandwidth" in out
    assert "(4096 scored)" in out
    assert "frozen head" in out
    assert "  TN" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "n D V: three numbers for each shape, as 8192 4096 128256, got 0"),
        (["1", "2"], "got 2"),
        (["1", "2", "x"], "must be a positive whole number, got 'x'"),
        (["1", "0", "2"], "must be a positive whole number, got '0'"),
        (
            ["1", "2", "3", "--masked", "1"],
            "--masked: must be a share of the rows, at least 0 and less than 1, got '1'",
        ),
        (["1", "2", "3", "--masked", "0.9"], "--masked: leaves none of 1 rows scored"),
        (["1", "2", "3", "--rate", "nan"], "--rate: must be a positive number, got 'nan'"),
        (["1", "2", "3", "--workspace", "-1"], "--workspace: must be a positive number, got '-1'"),
        (["1", "2", "3", "--device", "v100"], "--device: invalid choice: 'v100'"),
        (["1", "2", "3", "--frozen", "--no-grad"], "--frozen: has a gradient"),
        (["--docs", "gone.md"], "--docs: "),
    ],
)
def test_arguments_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_page_says_what_is_counted(tmp_path):
    shown = PAGE.read_text(encoding="utf-8").partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]
    assert shown == section(), "python -m l3m_kernels.roofline --docs docs/kernels.md"
    page = tmp_path / "page.md"
    page.write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    assert rewrite(page)
    assert not rewrite(page)
    assert page.read_text() == f"a\n{BEGIN}\n{section()}\n{END}\nb\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no <!-- roofline"):
        rewrite(page)
