"""`constrained(TrainerClass)`: what all of them share, on transformers' own Trainer; TRL's where it is installed."""

import importlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl_runs
from training_runs import assert_same_weights

import l3ms

TRL = pytest.mark.skipif(find_spec("trl") is None, reason='trl is not installed: pip install ".[trl]"')
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning"),
]
OFFLINE = ["Trainer", pytest.param("SFTTrainer", marks=TRL), pytest.param("DPOTrainer", marks=TRL)]
ONLINE = [pytest.param("GRPOTrainer", marks=TRL), pytest.param("RLOOTrainer", marks=TRL)]
THEIRS = {"SFTTrainer": "mean_token_accuracy", "DPOTrainer": "rewards/margins", "Trainer": "learning_rate"}


def bounds():
    return l3ms.Length(max=5), l3ms.KL(max=0.5)


@pytest.fixture
def make(tmp_path, tokenizer, make_model):
    """make(kind, **options) -> a constrained trainer of a tiny model."""

    def made(kind, constraints=None, model=None, **options):
        model = make_model(gain=0.3) if model is None else model
        return trl_runs.make(kind, tmp_path, tokenizer, model, constraints=constraints or bounds(), **options)

    return made


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_constraint_half_step_follows_each_task_half_step(kind, make):
    """With accumulation: two micro-batches of the task, then 8 responses to the rows' prompts."""
    data = l3ms.DataNLL("general", [{"input_ids": [3, 4, 5, 1], "labels": [-100, 4, 5, 1]}], max=2.0, batch_size=2)
    seen = []

    def columns(prompts, completions, number, trainer_state, **rest):
        seen.append((list(prompts), list(number), trainer_state.global_step))
        return [1.0] * len(prompts)

    constraints = (*bounds(), data, l3ms.Constraint("columns", columns, monitor=True))
    trainer = make(kind, constraints, gradient_accumulation_steps=2)
    trainer.train()
    assert type(trainer).__name__ == f"Constrained{kind}"
    assert trainer.l3m_optimizer.constraint_steps == 3
    assert [step for *_, step in seen] == [0, 1, 2]
    assert all(
        trl_runs.PROMPTS[number]["prompt"] == prompt for row in seen for prompt, number in zip(*row[:2], strict=True)
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert {
        "constraints/length/estimate",
        "constraints/general/lambda",
        "l3m/mu",
        "l3m/grad_norm/task",
        THEIRS[kind],
    } <= set(lines[0])
    lengths = trainer.last_rollout.host_lengths
    assert lines[-1]["constraints/length/batch_mean"] == pytest.approx(sum(lengths) / 8)
    assert lines[0]["constraints/columns/estimate"] == 1.0


def test_half_steps_are_those_of_the_trainer_of_ours(make, tmp_path, tokenizer, make_model):
    """Rows of one length: transformers' mean over tokens and our mean over sequences are the same task."""
    trainer = make("Trainer")
    trainer.train()
    args = l3ms.L3MConfig(
        **{**trl_runs.COMMON, "output_dir": str(tmp_path), "activation_checkpointing": False}, constraint_batch_size=8, max_new_tokens=16
    )  # fmt: skip
    rows = trl_runs.dataset("Trainer", tokenizer).to_list()
    ours = l3ms.L3MTrainer(
        make_model(gain=0.3), args, constraints=bounds(), train_dataset=rows, processing_class=tokenizer
    )
    ours.train()
    assert ours.last_rollout is not None
    assert_same_weights(trainer.model, ours.model, tolerance=1e-5)
    assert trainer.last_rollout.completions == ours.last_rollout.completions


@pytest.mark.parametrize(
    "kind", ["Trainer", *(pytest.param(it.values[0], marks=[TRL, pytest.mark.slow]) for it in OFFLINE[1:])]
)
@pytest.mark.parametrize("half_steps", ["alternating", pytest.param("joint", marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(kind, half_steps, make):
    settings = l3ms.L3MSettings(constraint_batch_size=8, max_new_tokens=16, half_steps=half_steps, average_fraction=0.5)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "l3m": settings, "optim": "adamw_torch"}
    whole = make(kind, **options)
    whole.train()
    again = make(kind, **options)
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-2")
    for name, value in weights(whole).items():
        assert torch.equal(dict(again.policy.named_parameters())[name], value), name
    assert again.l3m_optimizer.state_dict()["l3m"]["mu"] == whole.l3m_optimizer.state_dict()["l3m"]["mu"]
    assert again.l3m_optimizer.metrics() == whole.l3m_optimizer.metrics()
    assert again.last_rollout.completions == whole.last_rollout.completions
    assert again.average.n_averaged == whole.average.n_averaged == 2
    own = dict(whole.averaged_model().named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in again.averaged_model().named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
def test_a_trainer_that_samples_goes_on_from_a_checkpoint(kind, make):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    whole = make(kind, **options)
    whole.train()
    again = make(kind, **options)
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-2")
    assert again.l3m_optimizer.constraint_steps == whole.l3m_optimizer.constraint_steps == 4
    assert again.fewer_samples.sampled_tokens == whole.fewer_samples.sampled_tokens
    for name, value in weights(whole).items():
        assert torch.equal(dict(again.policy.named_parameters())[name], value), name


@pytest.mark.parametrize(
    "kind", [OFFLINE[0], *(pytest.param(it.values[0], marks=[TRL, pytest.mark.slow]) for it in [*OFFLINE[1:], *ONLINE])]
)
def test_adapters_are_trained_and_the_reference_is_the_model_without_them(kind, make, make_model):
    import peft

    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    adapted = {"model": peft.get_peft_model(make_model(gain=0.3), lora)} if kind == "Trainer" else {"peft_config": lora}
    kl = l3ms.KL(max=0.5)
    trainer = make(kind, (l3ms.Length(max=5), kl), **adapted)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, p in weights(trainer).items() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert kl.reference_model is None
    [ratio] = trainer.last_rollout.rewards([kl], trainer.policy).values()
    assert any(value != 0 for value in ratio)
    with trainer.policy.disable_adapter():
        [ratio] = trainer.last_rollout.rewards([kl], trainer.policy).values()
    assert ratio == [0.0] * len(ratio)


@pytest.mark.parametrize("kind", ["Trainer", pytest.param("SFTTrainer", marks=TRL)])
def test_prompts_of_ones_own(kind, make):
    plain = make(kind, prompts=["a", "b b"])
    chats = make(kind, prompts=[[{"role": "user", "content": "a"}]] * 3)
    for trainer, prompt in ((plain, ("a", "b b")), (chats, ([{"role": "user", "content": "a"}],))):
        trainer.train()
        assert all(found in prompt for found in trainer.last_rollout.prompts)
    ids = plain.last_rollout.input_ids[:, 0].tolist()
    assert {plain.processing_class.decode(token) for token in ids} <= {"a", "b"}  # the texts as they are, no turns
    assert plain.processing_class.decode(chats.last_rollout.input_ids[0][:2]) == "user :"


@TRL
def test_a_copy_of_the_model_computes_with_its_own_weights(make):
    """TRL's forward is of the model that it was made for; that of an averaged model, or of a KL reference, must not be."""
    trainer = make("SFTTrainer", l3m=l3ms.L3MSettings(constraint_batch_size=8, max_new_tokens=16, average_fraction=0.4))
    trainer.train()
    averaged = trainer.averaged_model()
    ids = torch.tensor([[3, 4, 5]])
    state = averaged.state_dict()
    plain = transformers.LlamaForCausalLM(averaged.config)
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(averaged(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert not torch.allclose(averaged(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@TRL
def test_an_optimizer_of_ones_own_is_warned_of(make, caplog, tmp_path, tokenizer, make_model):
    """Given to a trainer of TRL its constraints have no part in the training."""
    trl: Any = importlib.import_module("trl")
    model = make_model(gain=0.3)
    optimizer = l3ms.L3MOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), [l3ms.Length(max=5)])
    args = trl_runs.settings("SFTTrainer", tmp_path, max_steps=20, logging_steps=20)
    rows = trl_runs.dataset("SFTTrainer", tokenizer)
    with caplog.at_level(logging.WARNING, logger="l3ms"):
        trl.SFTTrainer(
            model, args, train_dataset=rows, processing_class=tokenizer, optimizers=(optimizer, None)
        ).train()
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("l3ms")]
    assert "20 steps, and nothing was observed: the constraints (length) have no part in this training" in said
    assert "l3ms.constrained(TrainerClass)" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*OFFLINE, *ONLINE])
def test_in_bfloat16_and_with_activations_made_again(kind, make):
    plain = make(kind)
    plain.train()
    saving = make(kind, activation_checkpointing=True)
    saving.train()
    assert_same_weights(saving.policy, plain.policy, tolerance=1e-5)
    rounded = make(kind, bf16=True, max_steps=1)
    rounded.train()
    first = [trainer.state.log_history[0] for trainer in (plain, rounded)]
    assert first[0]["constraints/length/estimate"] == pytest.approx(first[1]["constraints/length/estimate"], abs=4.0)
    assert rounded.l3m_optimizer.constraint_steps == 1


@TRL
@pytest.mark.slow
def test_the_quick_start_of_the_page_runs(tmp_path, tokenizer, make_model, monkeypatch):
    """As it is written, but for the model, the data and where it runs."""
    import datasets

    trl: Any = importlib.import_module("trl")
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(gain=0.3, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    page = (Path(__file__).resolve().parents[3] / "docs" / "trl.md").read_text()
    first, second = [block.split("```")[0] for block in page.split("```python\n")[1:3]]
    changed = [line for line in first.splitlines() if line.rstrip().endswith(("# 1", "# 2", "# 3"))]
    assert len(changed) == 3
    data = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in trl_runs.PROMPTS]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    monkeypatch.setattr(importlib.import_module("trl.trainer.grpo_trainer"), "GRPOConfig", lambda folder: trl_runs.settings(
        "GRPOTrainer", tmp_path / folder, max_completion_length=32, max_steps=2,
    ))  # fmt: skip
    monkeypatch.setattr(importlib.import_module("trl.rewards"), "accuracy_reward", trl_runs.longer)
    names: dict[str, Any] = {}
    exec(first.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "model")), names)
    assert isinstance(names["trainer"], trl.GRPOTrainer)
    assert names["trainer"].l3m_optimizer.constraint_steps == 2
    exec(second, names)
    assert names["verdict"].verdict in ("SATISFIED", "VIOLATED", "INCONCLUSIVE")


def test_arguments_are_known_by_name_through_a_class_that_hands_them_on(make_model):
    from l3ms.training.given_trainers import _by_name

    class First(transformers.Trainer):
        def __init__(self, model, *args, extra=1, **kwargs):
            super().__init__(model, *args, **kwargs)

    class Second(First):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    kind = l3ms.constrained(Second)
    found = _by_name(kind, (1, 2), {"train_dataset": [3], "extra": 4, "processing_class": 5})
    assert found == {"model": 1, "args": 2, "train_dataset": [3], "extra": 4, "processing_class": 5}
    assert _by_name(l3ms.constrained(transformers.Trainer), (1, 2, 3), {}) == {
        "model": 1,
        "args": 2,
        "data_collator": 3,
    }


def test_rows_that_are_given_later_are_answered(make):
    trainer = make("Trainer", max_steps=1)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"number": -1})
    trainer.train()
    assert set(trainer.last_rollout.columns["number"]) == {-1}
