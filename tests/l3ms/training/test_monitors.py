"""Monitors: rewards that are measured beside the constraints, and change nothing."""

import copy
import functools
import math
import random

import numpy as np
import pytest
import torch
from observing import make, observe, step
from run_folders import strict_json, write_project, write_run
from training_runs import rows, run

import l3ms
from l3ms.commands.command_line import main
from l3ms.config.run_config import ConfigError, load_config
from l3ms.model.batches import Collator
from l3ms.runs.figure import draw
from l3ms.verdicts.certificates import Declared, judge
from l3ms.verdicts.checking import Start

LENGTH = l3ms.Length(min=3, max=6)


def shares(prompts, completions, **columns):
    """Some missing: 0 or 1 where the text has an a or a b, None elsewhere."""
    return [float("a" in text) if {"a", "b"} & set(text) else None for text in completions]


MONITORS = {
    "function": lambda: l3ms.Constraint("seen", shares, monitor=True),
    "share": lambda: l3ms.Constraint("seen", shares, threshold=0.5, monitor=True),
    "length": lambda: l3ms.Length(name="seen", monitor=True),
    "kl": lambda: l3ms.KL(name="seen", monitor=True),
    "data": lambda: l3ms.DataNLL("seen", rows(8, seed=5), batch_size=4, monitor=True),
}


OPTIONS = {
    "adaptive": {},
    "separate": {"clipping": "separate"},
    "dual_ascent": {"solver": "dual_ascent"},
    "joint": {"half_steps": "joint"},
}


@pytest.fixture(scope="module")
def without(make_model, tokenizer, tmp_path_factory):
    """without(options) -> the trainer of a run without a monitor, one for all that are compared with it."""

    @functools.cache
    def trained(options):
        data = l3ms.DataNLL("general", rows(8, seed=3), max=2.0, batch_size=4)
        folder, model = tmp_path_factory.mktemp("without"), make_model(attention_dropout=0.1)
        return run(folder, tokenizer, model, constraints=[LENGTH, data], max_steps=4, **OPTIONS[options])[0]

    return trained


@pytest.mark.parametrize(
    ("kind", "options", "first"),
    [
        pytest.param(
            kind, name, first, marks=[] if (kind == "function" if first else name == "adaptive") else pytest.mark.slow
        )
        for kind in MONITORS
        for name in OPTIONS
        for first in (True, False)
    ],
)
def test_a_run_is_bit_for_bit_the_one_without(make_model, train, without, kind, first, options):
    data = l3ms.DataNLL("general", rows(8, seed=3), max=2.0, batch_size=4)
    constraints = [MONITORS[kind](), LENGTH, data] if first else [LENGTH, data, MONITORS[kind]()]
    ours = train(make_model(attention_dropout=0.1), constraints=constraints, max_steps=4, **OPTIONS[options])[0]
    theirs = without(options)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    mine, plain = ours.l3m_optimizer.metrics(), theirs.l3m_optimizer.metrics()
    own = {key: value for key, value in mine.items() if key.startswith("constraints/seen/")}
    assert {key: value for key, value in mine.items() if key not in own} == plain
    assert {"constraints/seen/estimate", "constraints/seen/stderr"} <= set(own)
    assert not {"constraints/seen/lambda", "constraints/seen/slack"} & set(own)
    assert math.isfinite(own["constraints/seen/estimate"])


def drawing(prompts, completions, **columns):
    """Draws from everybody's generators."""
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in completions]


def loader():
    data = [{name: row[name] for name in ("input_ids", "labels")} for row in rows(8, seed=5)]
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, collate_fn=Collator(0))  # type: ignore[arg-type]


SEEN_BY = {
    "loader": lambda: l3ms.DataNLL("seen", loader(), monitor=True),
    "function that draws": lambda: l3ms.Constraint("seen", drawing, monitor=True),
    "length": lambda: l3ms.Length(name="seen", monitor=True),
}
DEFAULT = {
    ("loader", "data"),
    ("function that draws", "function"),
    ("length", "length"),
    ("function that draws", "length"),
}


@pytest.mark.parametrize(
    ("monitor", "bounded"),
    [
        pytest.param(monitor, bounded, marks=[] if (monitor, bounded) in DEFAULT else pytest.mark.slow)
        for monitor in SEEN_BY
        for bounded in ("length", "data", "function")
    ],
)
def test_a_monitor_draws_nothing_from_the_generators_of_the_run(make_model, train, monitor, bounded):
    """Where nothing else samples, and where another reward draws after it."""
    constraint = {
        "length": LENGTH,
        "data": l3ms.DataNLL("general", rows(8, seed=3), max=2.0, batch_size=4),
        "function": l3ms.Constraint("noise", drawing, max=0.5),
    }[bounded]
    found = []
    for constraints in ([constraint], [SEEN_BY[monitor](), constraint]):
        trainer, _ = train(make_model(attention_dropout=0.1), constraints=constraints, max_steps=3)
        found.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]))
    assert torch.equal(*found)


def test_the_estimate_is_the_moving_average_of_its_values():
    opt = make(l3ms.Constraint("r", max=1.0), l3ms.Constraint("seen", monitor=True), smoothing=0.5)
    twin = make(l3ms.Constraint("r", max=1.0), smoothing=0.5)
    values, ours = [2.0, 0.5, 1.0], []
    for seen in ([4.0, None, 8.0], [1.0, 2.0, 3.0]):
        ours.append(observe(opt, {"r": values, "seen": seen}))
        assert torch.equal(ours[-1], observe(twin, {"r": values}))
    mean = (0.25 * 6 + 0.5 * 2) / 0.75
    assert opt.metrics()["constraints/seen/estimate"] == pytest.approx(mean)
    assert opt.metrics()["constraints/r/lambda"] == twin.metrics()["constraints/r/lambda"]
    observe(opt, {"r": values})
    assert opt.metrics()["constraints/seen/missing"] == 1
    assert opt.metrics()["constraints/seen/estimate"] == pytest.approx(mean)


def test_what_is_observed_first_does_not_fix_the_scale():
    """S is that of the first part with a constraint in it, whatever a monitor has seen before."""
    constraint, monitor = l3ms.Constraint("r", max=0.1), l3ms.Constraint("seen", monitor=True)
    weights = []
    for early in (True, False):
        opt = make(constraint, monitor)
        observe(opt, {"r": [0.2, 0.3]})
        if early:
            opt.observe({"seen": [7.0, 8.0]})
        weights.append(opt.observe({"r": [3.0, 4.0]}, torch.tensor([5, 9])))
        step(opt)
    assert torch.equal(*weights)


def test_noise_of_a_monitor_does_not_hold_mu():
    mus = []
    for extra in ([], [l3ms.Constraint("seen", monitor=True)]):
        opt = make(l3ms.Constraint("r", max=5.0), *extra, mu="auto")
        for n in range(60):
            values = {"r": [1.0, 1.0 + 1e-6 * n]} | ({"seen": [-1e6 * n, 1e6]} if extra else {})
            observe(opt, values)
        mus.append(float(opt.mu))
        assert not opt.conflicts.pairs
    assert mus[0] == mus[1]


def test_a_monitor_alone_and_one_with_a_bound_are_refused(make_model, train, tokenizer):
    for option in ("min", "max", "scale", "margin"):
        with pytest.raises(ValueError, match=f"{option} is for a constraint, and a monitor bounds nothing"):
            l3ms.Constraint("seen", shares, monitor=True, **{option: 1.0})
    with pytest.raises(ValueError, match="give min, max or both"):
        l3ms.Constraint("seen", shares)
    with pytest.raises(ValueError, match="all are monitors"):
        make(l3ms.Length(monitor=True))
    with pytest.raises(ValueError, match='all are monitors; use solver="none"'):
        train(make_model(), constraints=[l3ms.Length(monitor=True)])
    trainer, _ = train(make_model(), constraints=[l3ms.Length(monitor=True)], solver="none")
    assert trainer.l3m_optimizer is None


def test_a_copy_and_a_state_keep_its_estimate():
    opt = make(l3ms.Constraint("r", max=1.0), l3ms.Constraint("seen", monitor=True))
    observe(opt, {"r": [0.0, 1.0], "seen": [3.0, 5.0]})
    fresh = make(l3ms.Constraint("r", max=1.0), l3ms.Constraint("seen", monitor=True))
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    metrics = opt.metrics()
    del metrics["l3m/grad_norm/constraint"]  # of the last step of this process
    assert fresh.metrics() == metrics


SEEN = {"type": "length", "name": "seen", "monitor": True}


@pytest.mark.parametrize(
    ("constraints", "field", "words"),
    [
        ([{**SEEN, "max": 9}], "constraints.0.max", "is for a constraint, and a monitor bounds nothing"),
        ([{**SEEN, "scale": 2}], "constraints.0.scale", "is for a constraint"),
        ([SEEN], "constraints", "at least one constraint that is no monitor"),
        ([{"type": "length"}], "constraints.0", "give min, max or both"),
    ],
)
def test_a_configuration_is_refused_by_field(tmp_path, tokenizer, make_model, constraints, field, words):
    path = write_project(tmp_path, tokenizer, make_model(), constraints=constraints)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert caught.value.field == field


def test_a_run_with_monitors_from_the_command_line(tmp_path, tokenizer, make_model, capsys):
    """check, train, certify, plot."""
    data = {"train": str(tmp_path / "rows.jsonl"), "chat_template": False}
    monitors = [
        SEEN,
        {"type": "reward", "name": "variety", "reward": "distinct_n", "n": 2, "unit": "tokens", "monitor": True},
        {"type": "data_nll", "name": "old", "data": data, "monitor": True},
    ]
    constraints = [monitors[0], {"type": "length", "min": 1.5, "max": 15.5}, *monitors[1:]]
    path = write_project(tmp_path, tokenizer, make_model(seed=1), constraints=constraints)
    assert main(["check", str(path), "--samples", "20", "--json", str(tmp_path / "check.json")]) == 0
    found = {item["name"]: item for item in strict_json(tmp_path / "check.json")["constraints"]}
    assert found["seen"]["feasible"] is None
    assert found["seen"]["mean"] == found["length"]["mean"]
    assert main(["train", str(path)]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["certify", str(out), "--prices", "--probes", "32"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    certificate = strict_json(out / "certificate.json")
    verdicts = {item["name"]: item["verdict"] for item in certificate["constraints"]}
    assert verdicts == {"seen": None, "length": "SATISFIED", "variety": None, "old": None}
    assert certificate["one_sided_bounds"] == 2
    assert said.count(" monitor") >= 3
    assert {price["name"] for price in certificate["prices"]["bounds"]} == {"length"}
    assert main(["plot", str(out)]) == 0


def test_a_run_of_monitors_alone_is_not_certified(tmp_path, tokenizer, make_model, capsys):
    out = write_run(
        tmp_path, tokenizer, make_model(), make_model(), constraints=[SEEN],
        train={"solver": "none", "max_new_tokens": 16, "device": "cpu"},
    )  # fmt: skip
    assert main(["certify", str(out)]) == 2
    assert "monitors alone, so there is nothing to certify" in capsys.readouterr().err


def test_what_check_and_certify_say_of_one():
    monitor = l3ms.Constraint("seen", shares, monitor=True)
    start = Start.of(monitor, [0.5, 0.5, None])
    assert start.warnings() == ["seen: 1 of 3 responses have no value (None)"]
    assert math.isnan(start.feasible)
    verdict = judge(monitor, [0.1, 0.3, math.nan], 0.05, Declared("t", None, "no range is known"))
    assert verdict.verdict is None
    assert verdict.lower < 0.2 < verdict.upper
    assert verdict.notes[0] == "1 values are NaN or infinite and left out"


def test_its_panel_has_no_bounds_and_no_multiplier():
    metrics = [{"constraints/seen/estimate": 1.0 + n, "constraints/seen/stderr": 0.1, "iteration": n} for n in range(4)]
    figure = draw(metrics, {"constraints": [{"name": "seen", "min": None, "max": None}]})
    titles = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    multipliers = next(axes for title, axes in titles.items() if "Multiplier" in title)
    assert not multipliers.lines
