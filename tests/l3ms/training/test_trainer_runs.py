"""Runs of `L3MTrainer` against each other: other splits of a batch, a second time, from a checkpoint, and averaged."""

from typing import Any

import pytest
import torch
from training_runs import assert_moved, assert_same_weights, losses, rows, timeless

import l3ms

# ---- the same in other splits, and again ----


@pytest.mark.parametrize("solver", ["none", "barrier"])
def test_accumulated_micro_batches_are_one_batch(make_model, train, solver):
    """Task batches of 2 x 4 and of 8; the responses go through the model in parts of 4 (4 + 2) and 8."""
    parts, _ = train(make_model(), solver=solver, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    whole, _ = train(make_model(), solver=solver, gradient_accumulation_steps=1, per_device_train_batch_size=8)
    assert_moved(whole.model, make_model())
    assert_same_weights(parts.model, whole.model)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    if solver == "barrier":
        assert parts.l3m_optimizer.constraint_steps == 3
        ours, theirs = ({k: v for k, v in t.l3m_optimizer.metrics().items() if "task" not in k} for t in (parts, whole))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_run_is_reproducible_under_its_seed(make_model, train):
    first, second, other = (train(make_model(), seed=seed)[0] for seed in (1, 1, 2))
    assert_same_weights(first.model, second.model, 0.0)
    ours, theirs = (timeless(e for e in t.state.log_history if "loss" in e) for t in (first, second))
    assert ours == theirs
    with pytest.raises(AssertionError):
        assert_same_weights(first.model, other.model)


def test_mu_ends_where_it_should_when_the_run_counts_epochs(make_model, train):
    """10 rows in batches of 4 are 2 iterations an epoch."""
    trainer, _ = train(make_model(), data=rows(10), max_steps=-1, num_train_epochs=3, mu="paper", mu_end=1e-3)
    assert trainer.state.global_step == 6
    assert trainer.l3m_optimizer.metrics()["l3m/mu"] == pytest.approx(1e-3, rel=1e-9)


def test_training_again_goes_on_with_the_same_optimizer(make_model, train):
    trainer, _ = train(make_model(), max_steps=2)
    optimizer = trainer.l3m_optimizer
    trainer.train()
    assert trainer.l3m_optimizer is optimizer
    assert isinstance(optimizer.base, torch.optim.SGD)
    assert optimizer.constraint_steps == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
@pytest.mark.parametrize(
    ("step", "options"),
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(6, {}, marks=pytest.mark.slow),  # the end of an epoch, and of the first time around the prompts
        pytest.param(8, {}, marks=pytest.mark.slow),  # the average has begun
        (7, {"optim": "adamw_torch_fused", "learning_rate": 1e-2}),
        pytest.param(
            8,
            {"optim": "adamw_torch", "learning_rate": 1e-2, "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(8, {"solver": "none", "constraints": ()}, marks=pytest.mark.slow),
        pytest.param(8, {"adapter": True}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_in_the_middle_is_the_run_that_was_not_interrupted(make_model, train, tmp_path, step, options):
    """Weights, their average, what was sampled and what was logged: the same bits."""

    def model():
        if "adapter" not in options:
            return make_model()
        import peft

        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
            return peft.get_peft_model(make_model(), config)

    settings = {"max_steps": 10, "average_fraction": 0.4, "save_strategy": "steps", "save_steps": step}
    settings |= {"constraint_batch_size": 4, **{name: value for name, value in options.items() if name != "adapter"}}
    whole, expected = train(model(), **settings)
    folder = tmp_path / f"checkpoint-{step}"
    assert {path.name for path in folder.iterdir()} >= {"l3m.json"}
    assert (folder / "l3m_average.safetensors").exists() == (step >= 7)
    resumed, found = train(model(), **settings, resume=str(folder))
    assert len(found.weights) == 10 - step
    for ours, theirs in zip(found.weights, expected.weights[step:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if settings.get("solver") != "none":
        for ours, theirs in zip(found.rollouts, expected.rollouts[step:], strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
    assert_same_weights(resumed.averaged_model(), whole.averaged_model(), 0.0)
    assert_moved(resumed.averaged_model(), resumed.model)  # an average is not the last iterate
    ours, theirs = (timeless(e for e in t.state.log_history if "loss" in e) for t in (resumed, whole))
    assert ours == theirs


def test_a_checkpoint_of_other_prompts_or_of_before_begins_them_anew(make_model, train, tmp_path, caplog):
    train(make_model(), max_steps=2, save_strategy="steps", save_steps=2)
    folder, options = tmp_path / "checkpoint-2", {"max_steps": 3, "resume": str(tmp_path / "checkpoint-2")}
    _, first = train(make_model(), max_steps=1, prompts=rows(5, seed=9))
    _, recorder = train(make_model(), **options, prompts=rows(5, seed=9))
    assert "prompts were in another order" in caplog.text
    assert recorder.rollouts[0].prompts == first.rollouts[0].prompts
    for name in ("l3m.json", "manifest.json"):
        (folder / name).unlink()
    trainer, _ = train(make_model(), **options)
    assert "has no l3m.json" in caplog.text
    assert "has no manifest.json: it cannot be verified" in caplog.text
    assert trainer.state.global_step == 3


def test_a_checkpoint_brings_back_the_barrier(make_model, train, tmp_path):
    first, _ = train(make_model(), max_steps=4, save_strategy="steps", save_steps=2)
    state = first.l3m_optimizer.state_dict()["l3m"]
    again, recorder = train(make_model(), max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert again.l3m_optimizer.constraint_steps == state["constraint_steps"] == 4
    assert len(recorder.weights) == 2
    at_two, at_three = [entry for entry in first.state.log_history if "loss" in entry][1:3]
    resumed = [entry for entry in again.state.log_history if "loss" in entry]
    assert resumed[1]["constraints/length/estimate"] == at_two["constraints/length/estimate"]
    assert resumed[2]["l3m/mu"] == at_three["l3m/mu"]


# ---- averaged weights ----


@pytest.mark.parametrize(
    ("steps", "fraction", "averaged"),
    [
        *((7, 0.2, 2), (4, 0.2, 1), (3, 1.0, 3)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((10, 0.2, 2), (5, 0.2, 1), (6, 0.5, 3))),
    ],
)
def test_the_averaged_model_is_the_mean_of_the_last_iterates(make_model, train, steps, fraction, averaged):
    """With constraints, of those that the responses were sampled from: a half-step later the mean of the constraint is another."""
    options = {"solver": "none", "constraints": ()} if steps > 4 else {}
    options |= {"max_steps": steps, "average_fraction": fraction, "learning_rate": 0.2}
    trainer, recorder = train(make_model(), start=False, **options)
    sampled_from = []

    def half_step(of_the_trainer=trainer.constraint_half_step):
        sampled_from.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        of_the_trainer()

    trainer.constraint_half_step = half_step
    trainer.train()
    iterates = sampled_from if trainer.constraints else recorder.weights
    assert len(iterates) == steps
    mean = {name: torch.stack([w[name].double() for w in iterates[-averaged:]]).mean(0).float() for name in iterates[0]}
    average = trainer.averaged_model()
    assert_same_weights(average, mean, 3e-7)
    assert average is not trainer.model
    assert_same_weights(trainer.model, recorder.weights[-1], 0.0)
    if averaged > 1:
        assert any(
            (p - q).abs().max() > 1e-4 for p, q in zip(average.parameters(), trainer.model.parameters(), strict=True)
        )


def test_nothing_averaged_is_a_copy_of_the_last_iterate(make_model, train):
    trainer, _ = train(make_model(), average_fraction=0.0, solver="none", constraints=())
    average = trainer.averaged_model()
    assert average is not trainer.model
    assert_same_weights(average, trainer.model, 0.0)


def test_the_averaged_model_generates_and_is_saved(make_model, train, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer, _ = train(make_model(), max_steps=5)
    average: Any = trainer.averaged_model()
    out = l3ms.rollout(average, tokenizer, ["a"], max_new_tokens=3)
    average.save_pretrained(tmp_path / "average")
    trainer.save_model(str(tmp_path / "last"))
    for folder, model in (("average", average), ("last", trainer.model)):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(again(out.input_ids).logits, model.eval()(out.input_ids).logits)


def test_the_best_checkpoint_is_kept_and_loaded(make_model, train, tmp_path):
    """Its path is where it ended up, not where it was written."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
    }
    options |= {"max_steps": 5, "load_best_model_at_end": True, "learning_rate": 2.0, "held_out": rows(8, seed=5)}
    trainer, recorder = train(make_model(), **options)
    found = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(found, key=lambda step: found[step])
    assert best < 5
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert {path.name for path in tmp_path.glob("*checkpoint*")} <= {f"checkpoint-{best}", "checkpoint-5"}
    assert_same_weights(trainer.model, recorder.weights[best - 1], 0.0)
