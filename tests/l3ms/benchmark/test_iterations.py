"""`l3ms bench --op iteration` on a tiny model: the same work for all, its gradients compared, phases that add up, tables and the page."""

import sys

import pytest
import torch

from l3ms.benchmark import iterations
from l3ms.benchmark.environment import describe
from l3ms.benchmark.iteration_results import SHOWN, IterationMeasurement, IterationResult
from l3ms.benchmark.iterations import BenchClock, Work, measure
from l3ms.benchmark.page import ITERATION_NOT_MEASURED, section
from l3ms.benchmark.plain_loop import backward, difference
from l3ms.benchmark.results import Results, read, write
from l3ms.benchmark.tables import iteration_grid, markdown, report
from l3ms.commands.command_line import main
from l3ms.model.heads import fuse_head
from l3ms.training.phase_summary import PHASES

PAIRS = [(f"{word} b", f"{other} d e {word}") for word in "abcdef" for other in "abcdef"]


@pytest.fixture
def work(tmp_path, tokenizer, make_model):
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(gain=0.3).save_pretrained(tmp_path / "model")
    return Work("tiny", str(tmp_path / "model"), PAIRS, batch=4, max_new_tokens=6, max_length=32, low=2, high=3)


@pytest.fixture
def without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(iterations.metadata, "version", lambda name: "1.16.0")


def test_ours_and_the_plain_loop_do_the_same_work(work, without_trl):
    found = measure(work, rounds=2)
    ours, plain, trl = found.measurements
    assert plain.error is not None
    assert 0 < plain.error < 1e-4
    assert "not installed: pip install trl==1.16.0" in str(trl.reason)
    assert trl.phases == []
    for item in (ours, plain):
        assert len(item.phases) == len(item.tokens) == 2
        assert all(set(phases) == set(PHASES) for phases in item.phases)
        assert all(4 <= tokens <= 4 * work.max_new_tokens for tokens in item.tokens)
        assert all(item.phase(name) > 0 for name in ("task", "sampling", "constraint", "optimizer"))
    assert ours.phase("rewards") > 0
    assert (found.task_rows, found.responses, found.lora) == (4, 4, None)


def test_other_weights_than_ours_are_found_out(work, without_trl, monkeypatch):
    """The comparison would see a loop that does something else."""
    wrong = lambda model, batch, seq_weight: backward(model, batch, 1.01 * seq_weight)  # noqa: E731
    monkeypatch.setattr("l3ms.benchmark.plain_loop.backward", wrong)
    with pytest.raises(RuntimeError, match=r"gradients of the plain loop differ from ours by .*e-0[23], at most 1e-03"):
        measure(work, rounds=1)


def test_the_plain_backward_is_the_fused_one(make_model):
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 1, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 4, 5, 6], [-100, -100, 1, -100]]),
    }  # fmt: skip
    weights = torch.tensor([0.5, -2.0])
    plain, fused = make_model(), fuse_head(make_model())
    backward(plain, batch, weights)
    fused(**batch, seq_weight=weights).loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.grad is not None] for model in (plain, fused)]
    assert difference(*gradients) < 1e-5


def test_the_clock_stops_while_gradients_are_looked_at(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(iterations.time, "perf_counter", lambda: now[0])
    clock = BenchClock(torch.device("cpu"))

    def look():
        now[0] += 100

    clock.before_step = look
    into = IterationMeasurement(contestant="a", title="a", kind="ours")
    with clock.iteration(into):
        now[0] += 1
        with clock.inside("optimizer"):
            now[0] += 2
    assert into.seconds == 3
    assert into.phase("optimizer") == 2


def made_up():
    def phases(factor):
        return [{**dict.fromkeys(PHASES, 0.0), "sampling": 1.0 * factor, "task": 0.5 * factor}] * 3

    measurements = [
        IterationMeasurement(
            contestant="l3ms", title="l3ms", kind="ours", phases=phases(1), tokens=[100] * 3, memory=64 << 20
        ),
        IterationMeasurement(
            contestant="plain", title="plain", kind="peer", phases=phases(3), tokens=[90] * 3, error=1e-6
        ),
        IterationMeasurement(contestant="trl", title="TRL", kind="peer", reason="not installed"),
    ]
    return IterationResult(
        model="tiny", parameters=1_070_000, lora=None, dtype="fp32", device="cpu", task_rows=4, responses=4, max_new_tokens=6,
        measurements=measurements,
    )  # fmt: skip


def test_the_table_and_the_readme(tmp_path):
    found = Results(environment=describe(), threads=1, rounds=3, seed=0)
    assert ITERATION_NOT_MEASURED in section([found])
    for _ in range(2):  # measured again: in place of the first
        found.add_iteration(made_up())
    assert read(write(found, tmp_path / "a.json")) == found
    assert len(found.iterations) == 1
    grid = iteration_grid(made_up())
    assert grid.header == ["", "iteration", "time / ours", *SHOWN, "tokens/s", "memory", "error"]
    assert grid.rows[0][:4] == ["l3ms", "1.50 s", "1.00", "1.00 s"]
    assert grid.rows[1][:4] == ["plain", "4.50 s", "3.00", "3.00 s"]
    assert grid.rows[0][-3:] == ["100", "64 MiB", "-"]
    assert "not run: TRL: not installed" in grid.notes
    assert markdown(grid) in report(found)
    text = section([found])
    assert "| **l3ms** | **1.50 s (1.00), 100 tokens/s, 64 MiB** |" in text
    assert "| plain | 4.50 s (3.00), 30 tokens/s, - |" in text
    assert ITERATION_NOT_MEASURED not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "iteration", "--op", "frozen"), "--op: iteration is measured by itself"),
        (("--op", "iteration", "--shape", "1,2,3"), "--op: iteration takes no --shape"),
        (
            ("--op", "iteration", "--contestants", "eager"),
            "--contestants: must be one of l3ms, plain, trl, got 'eager'",
        ),
        (("--model", "demo"), "--model: is of --op iteration"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command(work, without_trl, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("l3ms.commands.bench_iteration._work", lambda *arguments: work)
    out = tmp_path / "out"
    common = ("bench", "--op", "iteration", "--rounds", "1", "--threads", "1", "--output", str(out))
    assert main([*common, "--contestants", "l3ms,plain"]) == 0
    shown = capsys.readouterr().out
    assert "An iteration, tiny" in shown
    assert "tokens/s" in shown
    [path] = out.glob("*.json")
    assert [item.contestant for item in read(path).iterations[0].measurements] == ["l3ms", "plain"]
    assert path.stem == f"{describe().device}-iteration"
    assert out.joinpath(f"{path.stem}.md").read_text().count("An iteration, tiny") == 1
