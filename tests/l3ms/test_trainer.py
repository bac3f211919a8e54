"""`L3MTrainer` against loops written by hand, on tiny models."""

import math
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import l3ms


def rows(count=24, seed=0):
    """Prompts of 1 to 3 tokens, responses of 2 to 6 with EOS."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        prompt = torch.randint(3, 17, (1 + n % 3,), generator=generator).tolist()
        response = [*torch.randint(3, 17, (1 + n % 5,), generator=generator).tolist(), 1]
        made.append(
            {
                "input_ids": prompt + response,
                "labels": [-100] * len(prompt) + response,
                "prompt": f"prompt {n}",
                "number": n,
            }
        )
    return made


CONSTRAINTS = (l3ms.Length(max=6),)


class Recorder(TrainerCallback):
    """What the trainer trained on and where it was after each iteration."""

    def __init__(self):
        self.batches: list[dict[str, torch.Tensor]] = []
        self.rollouts: list[Any] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        model = self.trainer.model
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.rollouts.append(self.trainer.last_rollout)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


@pytest.fixture
def train(tmp_path, tokenizer):
    """train(model, **options) -> (trainer after training, recorder)."""

    def run(model, *, constraints=CONSTRAINTS, data=None, prompts=None, start=True, resume=None, **options):
        settings = {
            "output_dir": str(tmp_path),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "constraint_batch_size": 6,
            "max_new_tokens": 16,
            "learning_rate": 0.05,
            "optim": "sgd",
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        recorder = Recorder()
        trainer = l3ms.L3MTrainer(
            model,
            l3ms.L3MConfig(**{**settings, **options}),
            constraints=constraints,
            train_dataset=rows() if data is None else data,
            prompts=prompts,
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        recorder.trainer = trainer
        collate = trainer.data_collator

        def recording(features):
            recorder.batches.append(collate(features))
            return recorder.batches[-1]

        trainer.data_collator = recording
        if start:
            trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder

    return run


def log_likelihood(model, batch, temperature=1.0):
    """(N,) log pi of the labels and their (N,) counts, from the logits that the model returns."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    token = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, targets[..., None].clamp(min=0))[..., 0]
    return (token * scored).sum(1), scored.sum(1)


def plain_task_loss(model, batch):
    total, count = log_likelihood(model, batch)
    return -(total / count).mean()


def assert_same_weights(model, expected, tolerance=1e-6):
    expected = dict(expected.named_parameters()) if isinstance(expected, torch.nn.Module) else expected
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_moved(model, start):
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 1e-3


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- plain fine-tuning ----


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_without_the_constraints_it_is_the_sft_loop(make_model, train, optim):
    rate = {"sgd": 0.05, "adamw_torch": 1e-3}[optim]
    trainer, recorder = train(make_model(), constraints=(), solver="none", optim=optim, learning_rate=rate)
    assert trainer.l3m_optimizer is None
    model = make_model()
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
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
    assert [e for e in first.state.log_history if "loss" in e] == [e for e in second.state.log_history if "loss" in e]
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


def test_a_checkpoint_brings_back_the_barrier(make_model, train, tmp_path):
    first, _ = train(make_model(), max_steps=4, save_strategy="steps", save_steps=2)
    state = first.l3m_optimizer.state_dict()["l3m"]
    again, recorder = train(make_model(), max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert again.l3m_optimizer.constraint_steps == state["constraint_steps"] == 4
    assert len(recorder.weights) == 2
    at_two = [entry for entry in first.state.log_history if "loss" in entry][1]
    resumed = [entry for entry in again.state.log_history if "loss" in entry]
    assert resumed[1]["constraints/length/estimate"] == at_two["constraints/length/estimate"]
    assert resumed[2]["l3m/mu"] <= at_two["l3m/mu"]


# ---- averaged weights ----


@pytest.mark.parametrize(
    ("steps", "fraction", "averaged"), [(10, 0.2, 2), (7, 0.2, 2), (4, 0.2, 1), (5, 0.2, 1), (3, 1.0, 3), (6, 0.5, 3)]
)
def test_the_averaged_model_is_the_mean_of_the_last_iterates(make_model, train, steps, fraction, averaged):
    options = {"solver": "none", "constraints": ()} if steps > 4 else {}
    trainer, recorder = train(make_model(), max_steps=steps, average_fraction=fraction, learning_rate=0.2, **options)
    assert len(recorder.weights) == steps
    mean = {
        name: torch.stack([w[name].double() for w in recorder.weights[-averaged:]]).mean(0).float()
        for name in recorder.weights[0]
    }
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


# ---- what goes wrong ----


@pytest.mark.parametrize("half", ["task", "constraint"])
def test_a_gradient_that_is_not_finite_is_counted_and_not_applied(make_model, train, half):
    """Clipping before the step would turn an infinite norm into a zero gradient and hide it."""
    model = make_model()
    calls = []

    def spoil(gradient):
        calls.append(1)
        # Iteration 2: the task's backward is the third call, the constraints' the fourth (one part).
        return gradient * math.inf if len(calls) == (3 if half == "task" else 4) else gradient

    model.model.norm.weight.register_hook(spoil)
    trainer, recorder = train(model, per_device_train_batch_size=6)
    skipped = [entry["l3m/skipped_steps"] for entry in trainer.state.log_history if "loss" in entry]
    assert skipped == [0, 1, 1]
    assert trainer.l3m_optimizer.constraint_steps == (3 if half == "task" else 2)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert not torch.equal(*(recorder.weights[n]["lm_head.weight"] for n in (0, 1)))  # the other half was applied


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"constraints": ()}, 'none given; use solver="none"'),
        ({"constraints": (l3ms.Constraint("nll", max=2.0),)}, "'nll' has no function"),
        ({"constraints": ("length",)}, "l3ms.Constraint objects, got str"),
        ({"constraints": (l3ms.Length(max=2), l3ms.Length(min=1))}, "'length' is used twice"),
        ({"solver": "lagrange"}, "solver must be barrier or none, got 'lagrange'"),
        ({"mu": "fast"}, "mu must be auto or paper, got 'fast'"),
        ({"constraint_batch_size": 1}, "constraint_batch_size must be at least 2"),
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
