"""A first batch whose responses are all cut: it is said, and nothing jumps."""

import itertools
import logging

import pytest
import torch
from training_runs import run

import l3ms
from l3ms.training import constraint_step


@pytest.mark.parametrize("cut", [True, False])
def test_all_responses_cut_is_said(tmp_path, tokenizer, make_model, caplog, monkeypatch, cut):
    real = constraint_step.rollout

    def sampled(*args, **kwargs):
        out = real(*args, **kwargs)
        out.ended[:] = not cut
        return out

    monkeypatch.setattr(constraint_step, "rollout", sampled)
    with caplog.at_level(logging.WARNING, "l3ms"):
        run(tmp_path, tokenizer, make_model(), max_steps=3)
    assert caplog.text.count("iteration 1: all 6 responses are cut at max_new_tokens=16") == cut


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *(({}, 1), ({"scale": 0.25}, 0)),
        *(pytest.param(case, 0, marks=pytest.mark.slow) for case in ({"max": 14}, {"mu": "paper"}, {"max_steps": 9})),
    ],
    ids=str,
)  # fmt: skip
def test_a_barrier_that_is_flat_across_its_range_is_told_once(tmp_path, tokenizer, make_model, caplog, options, told):
    """In [3, 3.5] of scale 3.25 mu^2 is more than the range; with half of it as a scale, or in a wide one, it is less."""
    bounds = {"min": 3, "max": options.get("max", 3.5), "scale": options.get("scale")}
    rest = {name: value for name, value in options.items() if name not in bounds}
    with caplog.at_level(logging.WARNING, "l3ms"):
        run(tmp_path, tokenizer, make_model(), **({"constraints": (l3ms.Length(**bounds),), "max_steps": 12} | rest))
    assert caplog.text.count("iteration 10: constraint 'length': the noise of its estimate leaves mu at about") == told
    assert caplog.text.count("set scale: 0.25, half the range, or sample more") == told


def test_neither_mu_nor_lambda_jumps_after_it():
    """The estimate has no noise then, and much in the next step: mu moves by its fastest factor at most, lambda with it."""
    x = torch.nn.Parameter(torch.zeros(1))
    schedule = l3ms.NoiseFloorDecay(1.0, 1e-6, steps=200)
    opt = l3ms.L3MOptimizer(torch.optim.SGD([x], lr=0.0), [l3ms.Length(max=10)], mu=schedule)
    draw = torch.Generator().manual_seed(0)
    seen = []
    for step in range(12):
        ended = torch.randint(1, 64, (32,), generator=draw)
        lengths = torch.full((32,), 64) if step == 0 else torch.where(torch.rand(32, generator=draw) < 0.2, ended, 64)
        opt.observe({"length": lengths}, lengths)
        x.grad = torch.ones(1)
        opt.step()
        seen.append(opt.metrics())
    fastest = 1e-6 ** (1 / 200)
    for before, after in itertools.pairwise(seen):
        assert fastest * (1 - 1e-9) <= after["l3m/mu"] / before["l3m/mu"] <= (1 + 1e-9) / fastest
        assert 0.5 < after["constraints/length/lambda"] / before["constraints/length/lambda"] < 2
    assert seen[0]["l3m/mu"] >= fastest * (1 - 1e-9)
