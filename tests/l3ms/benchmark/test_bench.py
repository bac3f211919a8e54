"""The benchmark's measurements on tiny shapes: all agree with float64 and take turns, memory is what was held. No time is asserted."""

import math
import statistics
import sys

import pytest
import torch

from l3ms.benchmark import memory, run
from l3ms.benchmark.contestant import Contestant, Functions, Unavailable, prepare
from l3ms.benchmark.contestants import contestants, eager, our_backends
from l3ms.benchmark.inputs import IGNORED, Source, expected, relative_error
from l3ms.benchmark.race import TOLERANCE, Race, turns
from l3ms.benchmark.results import gather
from l3ms.benchmark.scaling import over_constraints, over_rows
from l3ms.benchmark.shapes import FULL, OPS, Case, Shape, cases_of

SHAPE = Shape(64, 24, 300)
EAGER = [name for name, contestant in contestants().items() if not contestant.compiled]


def planted(run_or_token, **options) -> Contestant:
    return Contestant("planted", "planted", lambda case: run_or_token, **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_contestants_agree_with_float64(op, dtype):
    race = Race(Case(op, SHAPE, dtype, 0.4), [contestants()[name] for name in EAGER])
    race.check()
    entries = race.entries
    for name in ("reference", "eager", "torch-none", "torch-chunked", "trl", "products"):
        assert entries[name].reason is None
    for name in race.running:
        assert name == "products" or 0.0 < (entries[name].error or 0.0) <= TOLERANCE[dtype]
    absent = {name: entry.reason or "" for name, entry in entries.items() if not entry.run}
    assert all(absent.values()), "who does not run says why"
    assert not [why for why in absent.values() if "wrong" in why]
    sums = ("torch-none-sum", "torch-chunked-sum")
    if op in ("no-grad", "log-likelihood"):
        assert all("log-likelihoods of tokens" in absent[name] for name in sums)
    else:
        assert not set(sums) & set(absent)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler uses what torch has deprecated
def test_compiled_contestants_agree_with_float64():
    chosen = [contestant for contestant in contestants().values() if contestant.compiled]
    race = Race(Case("weighted", SHAPE, "fp32", 0.4), chosen)
    race.check()
    assert 0.0 < (race.entries["compile"].error or 0.0) <= TOLERANCE["fp32"]


@pytest.mark.parametrize("op", OPS)
def test_what_is_compared_with_is_the_formula(op):
    """Against logits that are held in float64: independent of the ops that are measured."""
    case = Case(op, SHAPE, "fp32", 0.4)
    batch = Source(case, seed=3).draw(0)
    hidden, weight = batch.hidden.detach().double().requires_grad_(), batch.weight.detach().double().requires_grad_()
    token = eager(hidden, weight, batch.targets)
    by_token = batch.upstream if op == "log-likelihood" else -batch.seq_weight.repeat_interleave(64 // 16)
    gradients = torch.autograd.grad((by_token.double() * token).sum(), (hidden, weight))
    wanted = {"no-grad": (token.detach(),), "frozen": gradients[:1]}.get(op, gradients)
    for found, right in zip(expected(case, batch), wanted, strict=True):
        torch.testing.assert_close(found, right)


def test_inputs_are_new_in_every_round_and_likely():
    case = Case("weighted", Shape(256, 32, 1000), "fp32", 0.4)
    source = Source(case, seed=0)
    first, second, again = source.draw(0), source.draw(1), Source(case, seed=0).draw(1)
    assert not torch.equal(first.hidden, second.hidden)
    assert torch.equal(second.hidden, again.hidden)
    assert torch.equal(second.targets, again.targets)
    assert int((first.targets != IGNORED).sum()) == case.scored == 154
    assert 1.0 < statistics.mean(source.nll) < 4.0 < math.log(1000)
    token = eager(first.hidden, first.weight, first.targets).detach()
    assert -float(token.sum()) / case.scored == pytest.approx(source.nll[0], rel=0.2)
    assert not Source(case._replace(op="frozen"), 0).draw(0).weight.requires_grad


def test_turns_go_round():
    found = list(turns(["a", "b", "c"], {"a": 3, "b": 1, "c": 3}))
    assert found == [(0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "a"), (2, "c"), (2, "a")]
    assert list(turns([], {})) == []


def test_contestants_take_turns_on_the_same_inputs():
    seen: list[tuple[str, float]] = []

    def witness(name: str) -> Contestant:
        def call(batch):
            seen.append((name, float(batch.hidden.detach()[0, 0])))
            return ()

        return Contestant(name, name, lambda case: Functions(run=call), "limit")

    race = Race(Case("weighted", SHAPE, "fp32", 0.0), [witness("a"), witness("b")])
    race.check()
    race.time(3)
    assert [name for name, _ in seen] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    values = [value for _, value in seen]
    assert values[::2] == values[1::2]
    assert len(set(values)) == 4
    assert [len(entry.seconds) for entry in race.entries.values()] == [3, 3]


def test_slow_contestants_take_part_in_fewer_rounds():
    race = Race(Case("weighted", SHAPE, "fp32", 0.0), [contestants()["eager"]])
    for first, wanted in ((0.001, 5), (3.0, 5), (5.0, 3), (100.0, 2)):
        race.entries["eager"].first = first
        assert race.rounds_of("eager", 5) == wanted
    assert race.rounds_of("eager", 1) == 1


def test_wrong_gradients_are_found():
    wrong = planted(Functions(lambda batch: 1.01 * eager(batch.hidden, batch.weight, batch.targets)))
    broken = Contestant("broken", "broken", lambda case: Functions(lambda batch: 1 // 0))  # pyright: ignore
    race = Race(Case("weighted", SHAPE, "fp32", 0.0), [wrong, broken])
    race.check()
    race.time(2)
    assert "wrong: error 1.0e-02 against float64" in str(race.entries["planted"].reason)
    assert "ZeroDivisionError" in str(race.entries["broken"].reason)
    assert not any(entry.seconds for entry in race.entries.values())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("cce", "cut_cross_entropy"),
        ("liger-grpo", "liger_kernel.chunked_loss"),
        ("quack", "quack.linear_cross_entropy"),
    ],
)
def test_missing_peer_is_reported_with_its_reason(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    race = Race(Case("weighted", SHAPE, "fp32", 0.0), [contestants()[name], contestants()["eager"]])
    race.check()
    race.time(1)
    item = gather(race, "eager").find(name)
    assert item is not None
    assert item.seconds == []
    assert "not installed" in str(item.reason)


def test_backend_without_the_op_says_so(monkeypatch):
    case = Case("weighted", SHAPE, "fp32", 0.0)
    with pytest.raises(Unavailable, match="no such thing"):
        prepare(Contestant("a", "a", lambda case: (_ for _ in ()).throw(Unavailable("no such thing"))), case)
    assert our_backends()[-1] == "reference"
    race = Race(case, [contestants()["reference"]])
    assert run.ours_of(race, None) == run.ours_of(race, "reference") == "reference"
    assert run.ours_of(race, "cpp") is None


linux = pytest.mark.skipif(not memory.CLEAR.exists(), reason="the peak is read from /proc, and its mark reset there")


@linux
def test_memory_finds_what_was_held_and_let_go():
    held = 48 << 20

    def call(batch):
        returned = torch.ones(4 << 20)  # 16 MiB that do not count
        torch.ones(held // 4).sum()
        return (returned,)

    torch.ones(held).sum()  # an earlier, higher mark must not hide it
    slack = 8 << 20  # the kernel counts pages in batches
    assert abs(memory.peak(call, None) - held) < slack


@linux
def test_memory_in_a_fresh_process():
    case = Case("weighted", Shape(512, 16, 8192), "fp32", 0.0)
    logits = 4 * 512 * 8192  # 16 MiB
    assert memory.measure("eager", case, threads=1) > 2 * logits
    with pytest.raises(memory.NotMeasured, match="KeyError"):
        memory.measure("nobody", case, threads=1)


@linux
def test_who_takes_minutes_is_out_before_anyone_waits(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT", 0.05)
    case = Case("weighted", SHAPE, "fp32", 0.0)
    found = run.measure(case, run.Plan(cases=(case,), contestants=("eager", "products"), rounds=1))
    eager_, products = found.measurements
    assert "one call took more than 0.05 s" in str(eager_.reason)
    assert eager_.seconds == []
    assert len(products.seconds) == 1


def test_scaling():
    like = Case("weighted", SHAPE, "fp32", 0.0)
    rows = over_rows((16, 32), like, [contestants()["reference"], contestants()["quack"]], 2, 0, lambda text: None)
    assert [(point.size, point.contestant, len(point.seconds)) for point in rows.points] == [
        (16, "reference", 2), (16, "quack", 0), (32, "reference", 2), (32, "quack", 0),
    ]  # fmt: skip
    assert all(point.reason for point in rows.points if point.contestant == "quack")
    found = over_constraints((1, 8), like, None, 2, 0, lambda text: None)
    assert [(point.size, len(point.seconds)) for point in found.points] == [(1, 2), (8, 2)]


def test_committed_cases_are_all_there():
    assert len(FULL) == len(set(FULL)) == sum(len(cases_of(op)) for op in OPS)
    assert {case.op for case in FULL} == set(OPS)
    for op in OPS:
        assert {(case.dtype, case.masked) for case in cases_of(op)} == {
            (d, m) for d in ("bf16", "fp32") for m in (0.0, 0.4)
        }
    assert FULL[0].flops == 6 * 2048 * 1024 * 32000


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert relative_error(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.6)
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), torch.tensor([3.0, 4.0])))
