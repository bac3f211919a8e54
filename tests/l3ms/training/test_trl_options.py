"""What of a trainer's options a constrained one refuses: in one line, by name."""

import importlib
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
import trl_runs

import l3ms

TRL = pytest.mark.skipif(find_spec("trl") is None, reason='trl is not installed: pip install ".[trl]"')
pytestmark = pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")
GRPO, SFT = "GRPOTrainer", "SFTTrainer"


@pytest.fixture
def refused(tmp_path, tokenizer, make_model):
    """refused(kind, **options) -> what a constrained trainer says of them."""

    def made(kind, constraints=None, **options):
        constraints = (l3ms.Length(max=5),) if constraints is None else constraints
        with pytest.raises(ValueError) as error:  # noqa: PT011
            trl_runs.make(kind, tmp_path, tokenizer, make_model(), constraints=constraints, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return made


@TRL
@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (GRPO, {"top_p": 0.9}, "top_p must be 1.0: "),
        (GRPO, {"top_k": 5}, "top_k must be 0: "),
        (GRPO, {"min_p": 0.1}, "min_p must be 0.0: "),
        (GRPO, {"repetition_penalty": 1.2}, "repetition_penalty must be 1.0: "),
        (GRPO, {"generation_kwargs": {"num_beams": 2}}, "generation_kwargs must be empty: "),
        (GRPO, {"mask_truncated_completions": True}, "mask_truncated_completions must be False: it leaves responses that were cut out"),
        ("RLOOTrainer", {"mask_truncated_completions": True}, "mask_truncated_completions must be False: "),
        (GRPO, {"top_entropy_quantile": 0.2}, "top_entropy_quantile must be 1.0: it leaves tokens of low entropy out"),
        (GRPO, {"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold must be None: "),
        (GRPO, {"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "steps_per_generation * num_iterations = 3 must divide"),
        (GRPO, {"prompts": ["a"]}, "prompts: GRPOTrainer samples responses to its train_dataset"),
        (GRPO, {"l3m": l3ms.L3MSettings(constraint_batch_size=8)}, "l3m.constraint_batch_size is of responses that are sampled for the"),
        (GRPO, {"l3m": l3ms.L3MSettings(length_norm="sequence")}, "l3m.length_norm: what divides a response's weight in GRPOTrainer"),
        (GRPO, {"l3m": l3ms.L3MSettings(half_steps="alternating")}, "l3m.half_steps: GRPOTrainer takes one step on task and constraints"),
        (SFT, {"use_liger_kernel": True}, "use_liger_kernel must be False: "),
        (SFT, {"optim": "adalomo"}, "optim='adalomo' steps while gradients are made"),
        ("DPOTrainer", {"prompts": [{"text": "a"}]}, "prompts: constraint 'length' samples responses to prompts, and DPOTrainer's rows"),
    ],
)  # fmt: skip
def test_an_option_of_trl(kind, options, said, refused):
    if options.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    assert refused(kind, **options).startswith(said)


@TRL
@pytest.mark.parametrize("option", ["tools", "environment_factory"])
def test_turns_of_tools(option, tmp_path, tokenizer, make_model):
    trl: Any = importlib.import_module("trl")
    args = trl_runs.settings(GRPO, tmp_path)
    given = {option: [len] if option == "tools" else dict}
    with pytest.raises(ValueError, match=f"^{option} is not taken: what tools say"):
        l3ms.constrained(trl.GRPOTrainer)(
            make_model(), trl_runs.longer, args, constraints=[l3ms.Length(max=5)], **given
        )


@TRL
def test_classes_of_trl():
    trl: Any = importlib.import_module("trl")
    with pytest.raises(
        ValueError,
        match="of TRL's trainers SFTTrainer, DPOTrainer, GRPOTrainer, RLOOTrainer are taken, got RewardTrainer",
    ):
        l3ms.constrained(trl.RewardTrainer)
    made = l3ms.constrained(trl.GRPOTrainer)
    assert made is l3ms.constrained(trl.GRPOTrainer)
    assert issubclass(made, trl.GRPOTrainer)
    with pytest.raises(ValueError, match="ConstrainedGRPOTrainer takes constraints already"):
        l3ms.constrained(made)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (l3ms.L3MTrainer, "L3MTrainer takes constraints already"),
        (dict, "wanted a class of trainers"),
        (3, "wanted a class"),
    ],
)
def test_classes(given, said):
    with pytest.raises(ValueError, match=said):
        l3ms.constrained(given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"constraints": ()}, "constraints: none given"),
        ({"constraints": (l3ms.Constraint("x", min=1.0),)}, "constraint 'x' has no function"),
        ({"l3m": {"mu": "auto"}}, "l3m must be an l3ms.L3MSettings, got dict: the arguments of Trainer are args"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"prompts": []}, "prompts: constraint 'length' samples responses to prompts in random order, got none"),
    ],
)
def test_an_option_of_any_trainer(options, said, refused):
    assert said in refused("Trainer", **options)


def test_what_a_trainer_is_given(tmp_path, tokenizer, make_model):
    model, made = make_model(), l3ms.constrained(transformers.Trainer)
    args = trl_runs.settings("Trainer", tmp_path)
    given = {
        "constraints": [l3ms.Length(max=5)],
        "processing_class": tokenizer,
        "train_dataset": trl_runs.dataset("Trainer", tokenizer),
    }
    optimizer = l3ms.L3MOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [l3ms.Length(max=5)])
    with pytest.raises(ValueError, match="optimizers: give the plain optimizer"):
        made(model, args, optimizers=(optimizer, None), **given)
    with pytest.raises(ValueError, match="model_init is not taken"):
        made(None, args, model_init=lambda: model, **given)
    with pytest.raises(ValueError, match="args: an L3MConfig is for L3MTrainer; give Trainer its own arguments"):
        made(model, l3ms.L3MConfig(output_dir=str(tmp_path), use_cpu=True), **given)
    with pytest.raises(
        ValueError, match=r"processing_class: constraints on responses need the model's tokenizer, .* got NoneType"
    ):
        made(model, args, **{**given, "processing_class": None})
    unrewarded = trl_runs.dataset("Trainer", tokenizer).remove_columns("prompt")
    with pytest.raises(
        ValueError, match=r"train_dataset: constraint 'length' samples .* Trainer's rows have no 'prompt', only"
    ):
        made(model, args, **{**given, "train_dataset": unrewarded})


def test_without_constraints_it_is_the_trainer_itself(tmp_path, tokenizer, make_model):
    runs = []
    for made in (l3ms.constrained(transformers.Trainer), transformers.Trainer):
        own: dict[str, Any] = {"l3m": l3ms.L3MSettings(solver="none")} if made is not transformers.Trainer else {}
        from l3ms.model.batches import Collator

        trainer = made(
            make_model(), trl_runs.settings("Trainer", tmp_path), train_dataset=trl_runs.dataset("Trainer", tokenizer),
            processing_class=tokenizer, data_collator=Collator(0), **own,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
