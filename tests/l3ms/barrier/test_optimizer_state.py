"""Keeping and restoring an `L3MOptimizer`: a run that was interrupted goes on as if it had not been."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist

import l3ms

CONSTRAINTS = (
    l3ms.Constraint("polite", min=0.3),
    l3ms.Length(min=4, max=6),
    l3ms.Constraint("size", max=5.0, margin=0.1),
)


class Run:
    """A linear policy over lengths, rewards with noise, gaps and NaN; constraint and task half-steps."""

    def __init__(self, base="adamw", constraints=CONSTRAINTS):
        torch.manual_seed(3)
        self.model = torch.nn.Linear(6, 8)
        make = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        }[base]
        mu = l3ms.NoiseFloorDecay(1.0, 1e-3, steps=20)
        self.opt = l3ms.L3MOptimizer(make(self.model.parameters()), constraints, mu=mu, nonfinite="drop")
        self.generator = torch.Generator().manual_seed(5)

    def iterate(self, count):
        seen = []
        for _ in range(count):
            inputs = torch.randn(12, 6, generator=self.generator)
            self.model(inputs).square().mean().backward()
            self.opt.step()
            self.opt.zero_grad()
            log_probabilities = self.model(inputs).log_softmax(-1)
            lengths = torch.multinomial(log_probabilities.exp(), 1, generator=self.generator)[:, 0]
            polite = [None if n == 7 else math.nan if n == 0 else n / 8 for n in lengths.tolist()]
            weights = self.opt.observe({"polite": polite, "length": lengths + 1}, lengths + 1)
            chosen = log_probabilities.gather(1, lengths[:, None])[:, 0]
            norm = torch.stack([p.square().sum() for p in self.model.parameters()]).sum()
            (self.opt.barrier_loss({"size": norm}) - (weights * chosen).sum()).backward()
            self.opt.step()
            self.opt.zero_grad()
            seen.append(self.opt.metrics())
        return seen

    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


def through_a_file(state, weights_only=True):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("keep", [copy.deepcopy, through_a_file], ids=["deepcopy", "file"])
def test_a_run_restored_in_the_middle_goes_on_bit_for_bit(base, keep):
    whole, first = Run(base), Run(base)
    expected = whole.iterate(9)
    assert first.iterate(4) == expected[:4]
    state = keep({"model": first.model.state_dict(), "opt": first.opt.state_dict()})

    second = Run(base)
    second.iterate(2)  # its own past is forgotten
    second.model.load_state_dict(state["model"])
    second.opt.load_state_dict(state["opt"])
    second.generator.set_state(first.generator.get_state())
    assert second.opt.metrics().items() >= {k: v for k, v in expected[3].items() if "grad_norm" not in k}.items()
    assert second.iterate(5) == expected[4:]
    assert torch.equal(second.weights(), whole.weights())
    assert expected[-1]["constraints/polite/dropped"] > 0


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(base, copied):
    run = Run(base)
    run.iterate(3)
    torch.optim.lr_scheduler.StepLR(run.opt, 100)  # puts a step() of its own in the object
    twin = Run(base)
    twin.model, twin.opt = copied((run.model, run.opt))
    twin.generator.set_state(run.generator.get_state())
    assert twin.opt.metrics() == run.opt.metrics()
    before = run.weights()
    expected = twin.iterate(4)
    assert torch.equal(run.weights(), before)
    assert run.iterate(4) == expected
    assert torch.equal(run.weights(), twin.weights())
    assert twin.opt.param_groups is twin.opt.base.param_groups
    assert twin.opt.state is twin.opt.base.state


def test_a_copy_is_in_the_same_group_of_processes_if_that_is_all_of_them(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run = Run()
        _, opt = copy.deepcopy((run.model, run.opt))
        assert opt.estimates.process_group is run.opt.estimates.process_group is dist.group.WORLD
        run.opt.estimates.process_group = dist.new_group([0])
        with pytest.raises(TypeError, match=r"process_group of its own is not copied; keep its state_dict\(\)"):
            copy.deepcopy(run.opt)
    finally:
        dist.destroy_process_group()


def test_the_state_is_a_copy():
    run = Run()
    run.iterate(2)
    state = run.opt.state_dict()["l3m"]
    kept = copy.deepcopy(state)
    run.iterate(2)
    assert torch.equal(state["mu"], kept["mu"])
    assert torch.equal(state["estimates"], kept["estimates"])
    assert torch.equal(state["dropped"], kept["dropped"])
    restored = Run()
    restored.opt.load_state_dict(run.opt.state_dict())
    before = copy.deepcopy(run.opt.state_dict()["l3m"])
    restored.iterate(2)
    assert torch.equal(run.opt.estimates.state, before["estimates"])
    assert torch.equal(run.opt.estimates.dropped, before["dropped"])


def test_counters_are_kept():
    run = Run()
    for _ in range(3):
        run.iterate(1)
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        run.opt.step()
        if run.opt.constraint_steps < 3:
            run.opt.zero_grad()
    run.opt.step()
    restored = Run()
    restored.opt.load_state_dict(run.opt.state_dict())
    assert restored.opt.constraint_steps == 3
    assert restored.opt.skipped_steps == 4
    for parameter in restored.model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    for _ in range(2):
        restored.opt.step()
    with pytest.raises(RuntimeError, match="5 steps in a row"):  # two of them before it was kept
        restored.opt.step()


def test_what_is_being_observed_is_not_kept():
    run = Run()
    run.iterate(1)
    run.opt.observe({"length": [100, 200]})
    restored = Run()
    restored.opt.observe({"length": [50, 60]})
    restored.opt.load_state_dict(run.opt.state_dict())
    assert restored.opt.estimates.pending is None
    restored.iterate(1)
    assert restored.opt.constraint_steps == 2
    assert restored.opt.metrics()["constraints/length/estimate"] < 9


def test_the_state_is_shared_with_the_base_after_loading():
    run = Run()
    run.iterate(1)
    restored = Run()
    restored.opt.load_state_dict(run.opt.state_dict())
    assert restored.opt.param_groups is restored.opt.base.param_groups
    assert restored.opt.state is restored.opt.base.state
    assert len(restored.opt.state) == 2
    restored.opt.param_groups[0]["lr"] = 0.0
    before = restored.weights()
    restored.iterate(2)
    assert torch.equal(restored.weights(), before)


def test_a_state_of_something_else_is_refused():
    run = Run()
    with pytest.raises(ValueError, match='has no "l3m"'):
        run.opt.load_state_dict(run.opt.base.state_dict())
    with pytest.raises(
        ValueError, match=r"constraints \['length'\], this optimizer has \['polite', 'length', 'size'\]"
    ):
        run.opt.load_state_dict(Run(constraints=[l3ms.Length(max=3)]).opt.state_dict())
    grown = Run()
    grown.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="parameter group"):  # torch's own
        run.opt.load_state_dict(grown.opt.state_dict())
    assert run.opt.constraint_steps == 0


def test_a_parameter_group_that_is_added_is_trained():
    run = Run()
    extra = torch.nn.Parameter(torch.ones(2))
    run.opt.add_param_group({"params": [extra], "lr": 0.5})
    assert run.opt.base.param_groups[1]["params"] == [extra]
    assert run.opt.param_groups[1]["betas"] == (0.9, 0.999)  # the base's defaults
    extra.grad = torch.ones(2)
    run.opt.step()
    assert extra.tolist() == pytest.approx([0.45, 0.45], rel=1e-3)  # 1 - 0.5 * 0.1 weight decay - 0.5 Adam
    run.opt.zero_grad()
    assert extra.grad is None
    run.iterate(1)


def test_hooks_of_torch_run():
    run, calls = Run(), []
    run.opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    run.opt.register_step_post_hook(lambda *_: calls.append("post"))
    run.iterate(1)
    assert calls == ["pre", "post"] * 2


def test_hooks_of_torch_on_states_run_and_may_change_them():
    opt = l3ms.L3MOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), [l3ms.Length(max=9)])
    called = []
    opt.register_state_dict_pre_hook(lambda optimizer: called.append("before"))
    opt.register_state_dict_post_hook(lambda optimizer, state: {**state, "more": 1})
    opt.register_load_state_dict_pre_hook(lambda optimizer, state: called.append(state.pop("more")))
    opt.register_load_state_dict_post_hook(lambda optimizer: called.append("after"))
    state = opt.state_dict()
    assert state["more"] == 1
    opt.load_state_dict(state)
    assert called == ["before", 1, "after"]
    assert state["more"] == 1, "the caller's stays as it is"


@pytest.mark.parametrize("sides", [(3, 9), (3, None)])
def test_a_state_of_other_sides_of_a_bound_is_refused(sides):
    """Shifts and multipliers are of each side; the bound itself may have moved."""
    opt, moved, other = (
        l3ms.L3MOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), [l3ms.Length(*bounds)])
        for bounds in ((None, 9), (None, 7), sides)
    )
    moved.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"the state is that of the bounds length max, this optimizer has length min"):
        other.load_state_dict(opt.state_dict())
    old = opt.state_dict()
    del old["l3m"]["sides"]
    moved.load_state_dict(old)
