"""`train.optimizer`: which weights Muon has, and what a configuration may ask of an optimizer."""

import pytest
import torch

from l3ms.config.errors import explain
from l3ms.config.optimizers import OTHERS, TORCH
from l3ms.config.run_config import ConfigError, RunConfig
from l3ms.config.train import TrainConfig
from l3ms.runs.arguments import named_optimizer
from l3ms.training.optimizers import MuonAndAdamW, torch_optimizer, try_step

SETTINGS = {"learning_rate": 1e-3, "betas": (0.5, 0.95), "weight_decay": 0.1}


def test_muon_has_the_matrices_of_hidden_layers_and_adamw_all_else(make_model):
    model = make_model()
    factory, options = torch_optimizer("muon", {"ns_steps": 3}, **SETTINGS)
    opt = factory()(model, **options)
    muon, adamw = opt.parts
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert theirs == {
        name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "head" not in name
    }
    assert theirs | others == set(names.values())
    assert theirs.isdisjoint(others)
    group = muon.param_groups[0]
    assert (group["momentum"], group["ns_steps"], group["adjust_lr_fn"], group["weight_decay"]) == (
        0.5,
        3,
        "match_rms_adamw",
        0.1,
    )
    assert {(p.ndim > 1, group["weight_decay"]) for group in adamw.param_groups for p in group["params"]} == {
        (True, 0.1),
        (False, 0.0),
    }


def test_muon_without_a_matrix_is_refused(make_model):
    model = make_model()
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)
    with pytest.raises(ValueError, match="optimizer muon: no matrix of a hidden layer is trained"):
        MuonAndAdamW()(model, **torch_optimizer("muon", {}, **SETTINGS)[1])


@pytest.mark.parametrize("name", TORCH)
def test_each_of_torchs_is_made_with_its_options(name):
    kind, options = torch_optimizer(name, {"eps": 1e-6} if name != "sgd" else {"momentum": 0.3}, **SETTINGS)
    if name == "muon":
        assert options["muon"]["eps"] == 1e-6
        return
    opt = kind([torch.nn.Parameter(torch.ones(2))], **options)
    assert opt.defaults["lr"] == 1e-3
    assert opt.defaults.get("betas", (0.5, 0.95)) == (0.5, 0.95)
    assert opt.defaults.get("eps", 1e-6) == 1e-6
    assert opt.defaults.get("momentum") == {"sgd": 0.3, "rmsprop": 0}.get(name)
    assert bool(opt.defaults["fused" if name.startswith("adamw") else "lr"]) == (name != "adamw")


def test_the_names_of_other_packages_are_transformers_own():
    from transformers.training_args import OptimizerNames

    assert {item.value for item in OptimizerNames} >= set(OTHERS)


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ({"optimizer": "adamW"}, "optimizer", "did you mean adamw?"),
        ({"optimizer": "mouon"}, "optimizer", "did you mean muon?"),
        ({"optimizer": "lomo"}, "optimizer", "steps while gradients are made"),
        ({"optimizer": "galore_adamw"}, "optimizer", "optim_target_modules"),
        ({"optimizer": "xyz"}, "optimizer", "wanted one of adamw_fused, adamw, muon"),
        ({"optimizer": "sgd", "betas": [0.9, 0.95]}, "betas", "are not used by optimizer sgd"),
        ({"optimizer": "grokadamw", "betas": [0.7, 0.8]}, "betas", "are not used by optimizer grokadamw"),
        ({"optimizer": "adamw_8bit", "optimizer_options": {"eps": 1e-6}}, "optimizer_options", "not of adamw_8bit"),
        ({"optimizer_options": {"lr": 1.0}}, "optimizer_options", "train.learning_rate"),
    ],
)
def test_what_an_optimizer_has_no_use_for_is_refused_by_its_field(section, field, message):
    from pydantic import BaseModel, ValidationError

    class Root(BaseModel):
        train: TrainConfig

    with pytest.raises(ValidationError) as error:
        Root.model_validate({"train": section})
    found = explain(error.value, Root)
    assert found.field == f"train.{field}"
    assert message in found.message


def test_an_option_that_torchs_optimizer_does_not_have_is_refused():
    with pytest.raises(ValueError, match="optimizer_options: sgd has no 'eps'; it has lr, momentum"):
        torch_optimizer("sgd", {"eps": 1.0}, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adamw", {"eps": None}, "eps of adamw must be float, got None"),
        ("adamw", {"eps": "1e-8"}, "eps of adamw must be float, got '1e-8'"),
        ("adamw", {"amsgrad": "no"}, "amsgrad of adamw must be bool, got 'no'"),
        ("adamw", {"foreach": 1}, "foreach of adamw must be .*bool.*, got 1"),
        ("sgd", {"momentum": True}, "momentum of sgd must be float, got True"),
        ("muon", {"ns_steps": 2.5}, "ns_steps of muon must be int, got 2.5"),
        ("adamw_fused", {"foreach": True}, "cannot be"),
        ("adamw", {"differentiable": True}, "leaf Variable"),
        ("adamw", {"capturable": True}, "capturable"),
        ("adamw", {"eps": -1}, "Invalid epsilon value"),
        ("muon", {"ns_steps": 200}, "steps"),
        ("muon", {"adjust_lr_fn": "other"}, "Adjust learning rate function other"),
    ],
)
def test_values_that_an_optimizer_cannot_step_with_are_refused(tmp_path, name, options, words):
    config = RunConfig.model_validate({
        "model": "a", "output": str(tmp_path), "data": {"train": "b.jsonl"}, "constraints": [{"type": "length", "max": 5}],
        "train": {"optimizer": name, "optimizer_options": options, "device": "cpu"},
    })  # fmt: skip
    with pytest.raises(ConfigError, match=f"^train.optimizer_options: .*{words}"):
        named_optimizer(config)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("muon", {"ns_steps": 3, "nesterov": False, "adjust_lr_fn": None}),
        ("adamw_fused", {"eps": 1e-6, "foreach": None}),
        ("sgd", {"momentum": 1e-1, "nesterov": True, "dampening": 0}),
    ],
)
def test_an_optimizer_is_tried_without_drawing_a_number(name, options):
    before = torch.get_rng_state()
    try_step(torch_optimizer(name, options, **SETTINGS), torch.device("cpu"))
    assert torch.get_rng_state().equal(before)
