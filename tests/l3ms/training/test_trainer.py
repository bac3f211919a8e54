"""`L3MTrainer` against loops written by hand, on tiny models."""

import math
import types
from functools import partial
from typing import Any

import pytest
import torch
from training_runs import assert_moved, assert_same_weights, log_likelihood, losses, rows

import l3ms


def plain_task_loss(model, batch):
    total, count = log_likelihood(model, batch)
    return -(total / count).mean()


# ---- plain fine-tuning ----


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_without_the_constraints_it_is_the_sft_loop(make_model, train, optim):
    rate = {"sgd": 0.05, "adamw_torch": 1e-3}[optim]
    trainer, recorder = train(make_model(), constraints=(), solver="none", optim=optim, learning_rate=rate)
    assert trainer.l3m_optimizer is None
    model = make_model()
    kind = {"sgd": torch.optim.SGD, "adamw_torch": partial(torch.optim.AdamW, betas=(0.5, 0.999))}[optim]
    optimizer = kind(model.parameters(), lr=rate, weight_decay=0.0)
    seen = []
    for step, batch in enumerate(recorder.batches[:3]):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / 3)
        optimizer.zero_grad()
        loss = plain_task_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
    assert_moved(model, make_model())
    assert_same_weights(trainer.model, model, 2e-6)
    assert losses(trainer) == pytest.approx(seen, rel=1e-6)


def test_evaluation_gives_the_task_loss(make_model, train):
    data = rows(8, seed=5)
    trainer, recorder = train(make_model(), start=False)
    recorder.batches.clear()
    values = trainer.evaluate(eval_dataset=data)
    with torch.no_grad():
        expected = plain_task_loss(make_model(), trainer.data_collator(data))
    assert values["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


# ---- with the constraints ----


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_training_with_the_fused_head_is_training_on_the_models_logits(make_model, train, kind):
    """The whole iteration by hand: both half-steps, their clips, S, and the rollouts that the trainer drew."""
    config = {"final_logit_softcapping": 4.0} if kind == "Gemma2" else {}
    trainer, recorder = train(
        make_model(kind, **config), max_steps=4, mu="paper", temperature=0.8, learning_rate=0.02, smoothing=0.5
    )
    model = make_model(kind, **config)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    estimate, weight, seen = 0.0, 0.0, []
    for step, (batch, out) in enumerate(zip(recorder.batches, recorder.rollouts, strict=False)):
        base.param_groups[0]["lr"] = 0.02 * (1 - step / 4)
        mu = 1e-6 ** (step / 4)
        base.zero_grad()
        loss = plain_task_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        base.step()
        seen.append(loss.item())

        lengths = out.lengths.double()
        weight = 0.5 * weight + 0.5
        estimate += 0.5 / weight * (lengths.mean().item() - estimate)
        margin = 2 * trainer_stderr(trainer, recorder, step)
        violation = (estimate - 6 + margin) / 6
        s = mu * mu
        multiplier = mu / -violation if violation <= -s else mu / s * (violation + 2 * s) / s
        baseline = (lengths.sum() - lengths) / (len(lengths) - 1)
        advantage = (baseline - lengths) / 6 / len(lengths) / lengths.mean()
        base.zero_grad()
        total, _ = log_likelihood(model, {k: out[k] for k in ("input_ids", "attention_mask", "labels")}, 0.8)
        (-(advantage.float() * total).sum()).backward()  # the gradient divided by lambda
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(multiplier, 1.0 / norm)
        base.step()
    assert len(seen) == 4
    assert_moved(model, make_model(kind, **config))
    assert_same_weights(trainer.model, model)
    assert losses(trainer) == pytest.approx(seen, rel=1e-6)


def trainer_stderr(trainer, recorder, step):
    """Standard error of the estimate as logged: its formula has tests of its own."""
    return [entry for entry in trainer.state.log_history if "loss" in entry][step]["constraints/length/stderr"]


def test_one_iteration_is_two_steps_and_one_tick(make_model, train):
    trainer, recorder = train(make_model(), max_steps=4, optim="adamw_torch", learning_rate=1e-3)
    optimizer = trainer.l3m_optimizer
    assert optimizer.constraint_steps == 4
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}
    assert trainer.lr_scheduler.last_epoch == 4
    assert recorder.rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert trainer.state.global_step == 4
    assert optimizer.estimates.pending is None


def test_every_iterations_metrics_are_logged(make_model, train):
    def share_of_a(prompts, completions, **columns):
        return [text.split().count("a") for text in completions]

    constraints = (l3ms.Length(min=2, max=4), l3ms.Constraint("share", share_of_a, min=0.2))
    trainer, recorder = train(make_model(), constraints=constraints, mu="paper", max_steps=3)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    names = [f"constraints/{c}/{k}" for c in ("length", "share") for k in ("estimate", "stderr", "lambda", "slack")]
    for entry, out in zip(entries, recorder.rollouts, strict=True):
        for name in [*names, "l3m/mu", "l3m/skipped_steps", "l3m/truncated", "learning_rate"]:
            assert math.isfinite(entry[name]), name
        assert entry["l3m/truncated"] == pytest.approx(1 - out.ended.float().mean().item())
        assert entry["l3m/skipped_steps"] == 0
    assert entries[0]["constraints/length/estimate"] == pytest.approx(
        recorder.rollouts[0].lengths.double().mean().item()
    )
    assert entries[0]["l3m/mu"] > entries[-1]["l3m/mu"]


def test_reward_functions_see_the_rows_columns(make_model, train):
    seen = []

    def watch(prompts, completions, completion_ids, number):
        seen.append((prompts, number))
        assert len(completions) == len(completion_ids) == 6
        return [0.0] * 6

    _, recorder = train(make_model(), constraints=(l3ms.Constraint("watch", watch, max=1.0),), max_steps=5)
    assert len(seen) == 5
    for prompts, numbers in seen:
        assert prompts == [f"prompt {n}" for n in numbers]
    order = [n for _, numbers in seen for n in numbers]
    assert sorted(order[:24]) == list(range(24))  # every prompt once before any twice
    assert order[:24] != list(range(24))
    data = rows()
    for out, (_, numbers) in zip(recorder.rollouts, seen, strict=True):
        for ids, n in zip(out.input_ids, numbers, strict=True):
            asked = [i for i, label in zip(data[n]["input_ids"], data[n]["labels"], strict=True) if label == -100]
            assert ids[: len(asked)].tolist() == asked


def test_prompts_of_the_rollouts_may_be_other_rows(make_model, train):
    _, recorder = train(make_model(), prompts=rows(3, seed=9), max_steps=1)
    assert set(recorder.rollouts[0].prompts) == {"prompt 0", "prompt 1", "prompt 2"}


# ---- what goes wrong ----


@pytest.mark.parametrize("half", ["task", "constraint"])
@pytest.mark.parametrize("factor", [math.inf, 1e30])
def test_a_gradient_whose_norm_is_not_finite_is_counted_and_not_applied(make_model, train, half, factor):
    """Clipping before the step would turn the infinite norm of a finite gradient into a step of 0, and hide it."""
    model = make_model()
    calls = []

    def spoil(gradient):
        calls.append(1)
        # Iteration 2: the task's backward is the third call, the constraints' the fourth (one part).
        return gradient * factor if len(calls) == (3 if half == "task" else 4) else gradient

    model.model.norm.weight.register_hook(spoil)
    trainer, recorder = train(model, per_device_train_batch_size=6)
    skipped = [entry["l3m/skipped_steps"] for entry in trainer.state.log_history if "loss" in entry]
    assert skipped == [0, 1, 1]
    assert trainer.l3m_optimizer.constraint_steps == (3 if half == "task" else 2)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert not torch.equal(*(recorder.weights[n]["lm_head.weight"] for n in (0, 1)))  # the other half was applied


def test_rows_that_are_given_later_are_answered(make_model, train):
    trainer, _ = train(make_model(), max_steps=1)
    trainer.train_dataset = [{**row, "number": -1} for row in rows(8, seed=9)]
    trainer.train()
    assert set(trainer.last_rollout.columns["number"]) == {-1}
    trainer, _ = train(make_model(), max_steps=1, prompts=rows(6, seed=3), start=False)
    trainer.train_dataset = [{**row, "number": -1} for row in rows(8, seed=9)]
    trainer.train()
    assert -1 not in trainer.last_rollout.columns["number"]


def test_a_stream_on_several_processes_has_no_counts():
    args: Any = types.SimpleNamespace(accelerator_config=None, world_size=2)
    collators = [type(l3ms.L3MTrainer._collator(args, None, data)).__name__ for data in (rows(2), Stream())]
    assert collators == ["CountingCollator", "Collator"]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows(4))


def test_both_half_steps_give_the_count_of_scored_tokens(make_model, train, monkeypatch):
    from l3ms.model import heads

    seen, real = [], heads.weighted_log_likelihood

    def watched(hidden, weight, targets, *rest, scored=None, **options):
        seen.append((scored, int((targets != -100).sum())))
        return real(hidden, weight, targets, *rest, scored=scored, **options)

    monkeypatch.setattr(heads, "weighted_log_likelihood", watched)
    train(make_model())
    given = [pair for pair in seen if pair[0] is not None]
    assert len(given) == 3 * (1 + 2)  # a task batch, and 6 responses in parts of 4 and 2, three times
    assert all(scored == counted for scored, counted in given)


def half_broken(prompts, completions, **columns):
    return [math.nan if row % 2 else 1.0 * len(text.split()) for row, text in enumerate(completions)]


def test_rewards_that_are_not_finite_are_an_error_or_dropped_and_counted(make_model, train):
    constraints = (l3ms.Constraint("words", half_broken, max=3.0),)
    with pytest.raises(ValueError, match="constraint 'words': half_broken: row 1 is nan"):
        train(make_model(), constraints=constraints)
    trainer, _ = train(make_model(), constraints=constraints, nonfinite="drop")
    counts = [e["constraints/words/dropped"] for e in trainer.state.log_history if "loss" in e]
    assert counts == [3, 6, 9]  # half of 6 responses, three times
    assert trainer.l3m_optimizer.constraint_steps == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"constraints": ()}, 'none given; use solver="none"'),
        ({"constraints": (l3ms.Constraint("nll", max=2.0),)}, "'nll' has no function"),
        ({"constraints": ("length",)}, "l3ms.Constraint objects, got str"),
        ({"constraints": (l3ms.Length(max=2), l3ms.Length(min=1))}, "'length' is used twice"),
        (
            {"solver": "lagrange"},
            "solver must be one of barrier, dual_ascent, augmented_lagrangian, penalty, none, got 'lagrange'",
        ),
        ({"mu": "fast"}, "mu must be auto or paper, got 'fast'"),
        ({"constraint_batch_size": 1}, "constraint_batch_size must be at least 2"),
        ({"nonfinite": "ignore"}, "nonfinite must be raise or drop, got 'ignore'"),
        ({"average_fraction": 1.5}, r"average_fraction must be in [0, 1], got 1.5"),
    ],
)
def test_bad_arguments_are_named(make_model, train, options, named):
    with pytest.raises(ValueError, match=r".") as error:
        train(make_model(), start=False, **options)
    assert named in str(error.value)


# ---- adapters ----


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
def test_an_adapter_is_trained_and_the_model_under_it_is_not(make_model, train, tokenizer):
    import peft

    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer, recorder = train(model, max_steps=2, learning_rate=0.5)
    before = dict(make_model().named_parameters())
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    changed = [n for n in recorder.weights[0] if not torch.equal(recorder.weights[0][n], recorder.weights[1][n])]
    assert changed
    assert all("lora" in name for name in changed)
    assert trainer.averaged_model() is not trainer.model
