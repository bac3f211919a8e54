"""The step without a wait and without a pass of its own over the gradients: what it touches, extremes, what the host learns late."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import l3ms
from l3ms.barrier import clipping, step_reports

FUSED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


class OwnAdamW(torch.optim.AdamW):
    """May do anything in its step."""


OTHERS = {
    "for-loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "subclass": lambda p: OwnAdamW(p, lr=0.1, fused=True),
    "partly fused": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "fused": False}, {"params": p[1:]}], lr=0.1, fused=True
    ),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
}


def make(base, dtype=torch.float32, mu: Any = 0.1, values=4, **options):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n * values, dtype=dtype)) for n in (1, 2, 5)]
    schedule = l3ms.ExponentialDecay(mu, mu, 1) if isinstance(mu, float) else mu
    constraints = [l3ms.Constraint("low", max=1.0, margin=0.0), l3ms.Constraint("high", min=2.0, margin=0.0)]
    return l3ms.L3MOptimizer(base(params), constraints, mu=schedule, smoothing=1.0, **options), params


def give(opt, value=1.0, constrained=False, values=None):
    """A gradient of `value` everywhere; what the constraints observe makes the step a constraint half-step."""
    if constrained:
        opt.barrier_loss({"low": torch.tensor(1.5), "high": torch.tensor(1.5)} if values is None else values)
    for group in opt.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, value)


class Seen(TorchDispatchMode):
    """Ops that ran, and those that were given a gradient."""

    def __init__(self, params):
        super().__init__()
        self.storages = {p.grad.untyped_storage().data_ptr() for p in params}
        self.names: set[str] = set()
        self.on_gradients: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.names.add(name)
        if name.endswith("_like"):
            return func(*args, **(kwargs or {}))  # looks at the shape
        given = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if any(isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() in self.storages for a in given):
            self.on_gradients.append(name)
        return func(*args, **(kwargs or {}))


class Late:
    """As with a GPU: copies to the host arrive when the test says so, and nothing else is known there."""

    def __init__(self, monkeypatch):
        self.arrived, self.sent = 0, 0
        monkeypatch.setattr(step_reports, "_copy_now", self.copy)
        monkeypatch.setattr(clipping, "_is_one", lambda factor: False)

    def copy(self, values):
        number, self.sent = self.sent, self.sent + 1

        def wait():
            self.arrived = max(self.arrived, number + 1)

        return step_reports.Copy(values.clone(), lambda: self.arrived > number, wait)


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("value", [1e-3, 5.0, math.nan])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_fused_base_is_stepped_without_a_wait_in_two_passes_over_the_gradients(
    monkeypatch, base, constrained, value, scaled
):
    """Two passes: the norm, and the update. On a GPU a wait is a `_local_scalar_dense`, a `tolist` or a copy to the host."""
    Late(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    opt, params = make(FUSED[base], mu=l3ms.NoiseFloorDecay(1.0, 0.1, 5))
    for _ in range(2):
        give(opt, value, constrained)
        if scaled:
            vars(opt).update(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
        with Seen(params) as seen:
            opt.step()
        assert seen.names.isdisjoint({"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"})
        assert seen.on_gradients == ["_foreach_norm", f"_fused_{type(opt.base).__name__.lower()}_"]


@pytest.mark.parametrize("base", OTHERS)
@pytest.mark.parametrize(("value", "passes"), [(1e-3, 0), (5.0, 1)])
def test_other_bases_have_their_gradients_multiplied_where_they_are_clipped(base, value, passes):
    opt, params = make(OTHERS[base])
    give(opt, value)
    with Seen(params) as seen:
        opt.step()
    assert seen.on_gradients.count("_foreach_mul_") == passes
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_left_clipped(base, dtype):
    """As by clip_grad_norm_: a fused kernel stores what it has divided. In float64 the multiplication comes first."""
    opt, params = make(FUSED[base], dtype)
    give(opt, 5.0)
    opt.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])  # type: ignore[misc]
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("base", [*FUSED, *OTHERS])
@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_first_step_that_is_not_taken_leaves_no_trace(base, value):
    """torch 2.13 would leave the momentum of a fused SGD uninitialised."""
    table = {**FUSED, **OTHERS}
    opt, params = make(table[base])
    plain, expected = make(table[base])
    give(opt, value, constrained=True)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    for _ in range(3):
        for one in (opt, plain):
            give(one, 0.7)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    assert opt.skipped_steps == math.isnan(value)
    assert opt.constraint_steps == (value == 0)


@pytest.mark.parametrize("base", ["adamw", "foreach"])
def test_a_skipped_constraint_step_commits_nothing(base):
    """Not even that a constraint had no sample, or that two of them were violated."""
    opt, _ = make({**FUSED, **OTHERS}[base], mu=l3ms.NoiseFloorDecay(1.0, 0.1, 5))
    give(opt, 1.0, True, {name: torch.tensor([1.49, 1.5, 1.5, 1.51]) for name in ("low", "high")})
    opt.step()
    before, state = opt.metrics(), opt.state_dict()["l3m"]
    give(opt, math.nan, True, {"low": torch.tensor(9.0)})
    opt.step()
    changed = {name for name, value in opt.metrics().items() if value != before.get(name)}
    assert changed == {"l3m/skipped_steps", "l3m/grad_norm/constraint"}
    after = opt.state_dict()["l3m"]
    assert after["conflicts"] == state["conflicts"]
    assert after["constraint_steps"] == state["constraint_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(after["last"], state["last"], strict=True))


# ---- extremes ----


@pytest.mark.parametrize("base", [FUSED["sgd"], lambda p: torch.optim.SGD(p, lr=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("multiplier", [1e-3, 1.0, 1e17, 1e30, 1e37, 1e60, 1e250])
@pytest.mark.parametrize("value", [1e-40, 1e-36, 1e-30, 1e-18, 1e-9, 1.0, 1e9, 1e18])
def test_the_step_is_the_clipped_one_whatever_the_sizes(base, dtype, multiplier, value):
    """One value per parameter: the norm of anything smaller than 1e-19 underflows in float32. SGD of lr 0.1 shows the clipped gradient."""
    x = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    opt = l3ms.L3MOptimizer(base([x]), [l3ms.Constraint("c", max=0.0, scale=1.0, margin=0.0)], mu="paper")
    opt.barrier_loss({"c": torch.tensor(1.0)})
    opt.estimates.total = torch.tensor(max(multiplier, 1.0), dtype=torch.float64)
    x.grad = torch.full_like(x, value)
    value = x.grad.item()  # rounded
    opt.step()
    factor = min(max(multiplier, 1.0), 1.0 / value)
    if dtype != torch.float64:
        factor = min(factor, 2.0**126)  # and its inverse is a normal number
    tolerance = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 1e-2}[dtype]
    assert x.item() == pytest.approx(-0.1 * value * factor, rel=tolerance, abs=1e-38)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("base", [FUSED["sgd"], lambda p: torch.optim.SGD(p, lr=0.1)])
def test_a_norm_that_float32_cannot_bring_down_to_the_limit_is_not_finite(base):
    x = torch.nn.Parameter(torch.zeros(1))
    opt = l3ms.L3MOptimizer(base([x]), [l3ms.Constraint("c", max=0.0)], max_grad_norm=1e-3)
    x.grad = torch.full_like(x, 3e38)
    opt.step()
    assert x.item() == 0
    assert opt.skipped_steps == 1


def test_parameters_of_several_dtypes_are_clipped_by_one_norm():
    params = [torch.nn.Parameter(torch.zeros(4, dtype=t)) for t in (torch.float32, torch.bfloat16, torch.float64)]
    for fused in (False, True):
        opt = l3ms.L3MOptimizer(torch.optim.SGD(params[: 3 - fused], lr=1.0, fused=fused), [l3ms.Length(max=1)])
        before = [p.detach().clone() for p in params]
        give(opt, 3.0)
        opt.step()
        moved = torch.cat([(q - p.detach()).double() for p, q in zip(params, before, strict=True)])
        assert moved.norm().item() == pytest.approx(1.0, rel=1e-2)  # bf16 rounds


# ---- what the host learns late ----


def test_giving_up_comes_late_and_the_steps_between_are_skipped(monkeypatch):
    late = Late(monkeypatch)
    opt, params = make(FUSED["adamw"], max_skipped=3)
    before = [p.detach().clone() for p in params]
    for _ in range(4):
        give(opt, math.nan, constrained=True)
        opt.step()
    late.arrived = 2
    give(opt, math.nan)
    opt.step()  # two in a row, as far as is known
    late.arrived = 4
    give(opt, math.nan)
    with pytest.raises(RuntimeError, match=r"constraint '(low|high)' was not finite in 4 steps in a row"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert opt.skipped_steps == 6
    give(opt)
    late.arrived = 7
    opt.step()  # a good one: the count begins again
    assert not torch.equal(params[0], before[0])


def test_late_reports_are_those_of_a_cpu_and_change_no_update(monkeypatch, caplog):
    def run(base):
        opt, params = make(base, mu=l3ms.NoiseFloorDecay(1.0, 1e-3, 10))
        generator = torch.Generator().manual_seed(0)
        seen = []
        for step in range(300):
            values = {name: 1.5 + 0.1 * torch.randn(16, generator=generator) for name in ("low", "high")}
            give(opt, math.nan if step % 7 == 3 else 1e-3, True, values)
            opt.step()
            give(opt, math.inf if step % 11 == 5 else 1e-3)
            opt.step()
            seen.append(opt.mu.clone())
        return opt, [*params, *seen]

    with caplog.at_level("INFO", logger="l3ms"):
        prompt, expected = run(FUSED["adamw"])
        told = [record.getMessage() for record in caplog.records]
        caplog.clear()
        with monkeypatch.context() as patch:
            late = Late(patch)
            opt, found = run(FUSED["adamw"])
            assert not caplog.records
            assert late.arrived == 0
            state = opt.state_dict()["l3m"]  # waits
    assert [record.getMessage() for record in caplog.records] == told
    assert any("mu waits" in message for message in told)
    assert any("look infeasible together" in message for message in told)
    assert opt.conflicts.pairs == prompt.conflicts.pairs == [("low", "high")]
    assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
    assert state["conflicts"] == prompt.state_dict()["l3m"]["conflicts"]
    assert opt.metrics() == prompt.metrics()


def test_a_copy_waits_for_what_is_under_way(monkeypatch):
    late = Late(monkeypatch)
    opt, _ = make(FUSED["sgd"])
    give(opt, constrained=True)
    opt.step()
    assert (late.arrived, late.sent) == (0, 1)
    copy.deepcopy(opt)
    assert late.arrived == 1


def test_a_loaded_state_knows_where_mu_was(caplog):
    reports = step_reports.StepReports(["r"], [0], l3ms.NoiseFloorDecay(), 5)
    state = {"mu": torch.tensor(0.3), "reported_mu": None, "conflicts": reports.conflicts.state_dict()}
    reports.load_state_dict(state)
    mu, one = torch.tensor(0.3), torch.ones(1)
    numbers = step_reports.StepNumbers(torch.tensor(0), torch.tensor(True), mu, one, one, one)
    with caplog.at_level("INFO", logger="l3ms"):
        reports.send(numbers)
    assert "mu waits at 0.3" in caplog.text


def test_a_loaded_state_forgets_what_was_under_way(monkeypatch):
    late = Late(monkeypatch)
    opt, _ = make(FUSED["sgd"], max_skipped=1)
    kept = opt.state_dict()
    give(opt, math.nan)
    opt.step()
    opt.load_state_dict(kept)
    late.arrived = 1  # that it was skipped
    give(opt)
    opt.step()
    assert opt.skipped_steps == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("base", ["momentum", "adam", "adamw"])
def test_a_gpu_is_not_waited_for(base):
    opt, _ = make(lambda params: FUSED[base]([p.data.cuda().requires_grad_() for p in params]))
    on_cpu, _ = make(FUSED[base])
    values = {"low": torch.tensor(1.5), "high": torch.tensor(1.5)}
    for step in range(8):
        for one in (opt, on_cpu):
            give(one, math.nan if step == 2 else 5.0, step % 2 == 1, values)
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        on_cpu.step()
    ours = torch.cat([p.detach().cpu() for p in opt.param_groups[0]["params"]])
    torch.testing.assert_close(ours, torch.cat([p.detach() for p in on_cpu.param_groups[0]["params"]]))
    assert opt.metrics() == pytest.approx(on_cpu.metrics(), rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_in_fp16_a_norm_that_fp16_cannot_hold_is_a_norm(fused):
    """With GradScaler's 65536 that is any above 1; torch's own optimizer makes these steps."""
    x = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.float16))
    # torch 2.13's fused SGD leaves 16-bit weights on a CPU as they are
    base = torch.optim.Adagrad([x], lr=0.01, fused=True) if fused else torch.optim.SGD([x], lr=1.0)
    opt = l3ms.L3MOptimizer(base, [l3ms.Length(max=9)], max_grad_norm=1.0)
    x.grad = torch.full_like(x, 1000.0)
    assert torch.nn.utils.get_total_norm([x.grad]).isinf()
    opt.step()
    assert opt.metrics()["l3m/grad_norm/task"] == pytest.approx(1e5, rel=1e-4)
    assert opt.skipped_steps == 0
    assert x.unique().item() == pytest.approx(0.99, abs=1e-3)
