"""GRPOTrainer and RLOOTrainer weigh their own samples: each step is on the gradient of the barrier problem, whatever the loss type.

The task's gradient is what TRL's own loss gives on the batches that were trained on; that of the constraints is written out, on logits.
"""

from typing import Any

import pytest
import torch
import trl_runs

import l3ms
from l3ms.barrier.optimizer import L3MOptimizer

trl = pytest.importorskip("trl", reason='trl is not installed: pip install ".[trl]"')
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning"),
]


def number(prompts, completions, number, **columns):
    """A reward of a column of the data, and of the response; none for one prompt."""
    return [None if n == 3 else len(text) % 3 + 0.1 * n for n, text in zip(number, completions, strict=True)]


def bounds():
    return l3ms.Length(max=5), l3ms.Constraint("number", number, min=1.5, max=2.5), l3ms.KL(max=0.1)


class Steps:
    """Of a trainer: before each step, the gradient that it is made with and the one that it should be."""

    def __init__(self, kind, monkeypatch):
        self.base = getattr(trl, kind)
        self.batches: list[dict] = []  # since the last step
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.trainer: Any = None
        self.old: Any = None
        self.fresh: list[bool] = []
        outer, step = self, L3MOptimizer.step

        class Recorded(self.base):
            def _prepare_inputs(self, generation_batch):
                outer.batches.append(super()._prepare_inputs(generation_batch))
                return outer.batches[-1]

        self.recorded = Recorded

        def checked(optimizer, closure=None):
            self.compare(optimizer)
            step(optimizer)

        monkeypatch.setattr(L3MOptimizer, "step", checked)

    def gradient(self):
        return torch.cat([p.grad.reshape(-1).double() for p in self.trainer.model.parameters() if p.requires_grad])

    def compare(self, optimizer):
        trainer = self.trainer
        ours, pending = self.gradient(), optimizer.estimates.pending
        self.fresh.append(pending is not None)
        if pending is not None:
            self.total, self.last = optimizer.estimates.total, pending.multiplier
            self.rollout, self.rewards = trainer.last_rollout, trainer.last_rewards
            self.old = None if self.rollout is None else self.token_log_likelihood(self.rollout).detach()
        kept = [p.grad for p in trainer.model.parameters()]
        trainer.model.zero_grad()
        for batch in self.batches:  # as TRL made it: its advantages are the task's
            loss = self.base._compute_loss(trainer, trainer.model, batch)
            (loss if self.base.__name__ == "GRPOTrainer" else loss / len(self.batches)).backward()
        self.barrier(optimizer.estimates).backward()
        self.batches = []
        self.found.append((ours, self.gradient() / self.total))
        for p, grad in zip(trainer.model.parameters(), kept, strict=True):
            p.grad = grad

    def divisor(self):
        kind = getattr(self.trainer, "loss_type", "rloo")
        of = {"rloo": 1, "luspo": 1, "dr_grpo": self.trainer.max_completion_length}
        return of.get(kind, float(self.rollout.lengths.float().mean()))

    def token_log_likelihood(self, batch, temperature=None):
        logits = self.trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        logits = logits[:, :-1] / (batch.temperature if temperature is None else temperature)
        token = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0].double()
        return torch.where(labels != -100, token, 0.0)

    def barrier(self, estimates):
        """sum_k lambda_k sign_k / scale_k C_k: of samples mean_n (c_n - b_n) ratio_n / d, b_n the mean of the others; of data the mean
        loss."""
        loss = torch.zeros((), dtype=torch.float64)
        for k, owner in enumerate(estimates.owner):
            constraint = estimates.constraints[owner]
            sign, _, scale = estimates.bounds.table[k, :3]
            if constraint.data:
                batch = self.trainer._data[constraint.name][0]
                nll = -self.token_log_likelihood(batch, 1.0).sum(1) / (batch["labels"][:, 1:] != -100).sum(1)
                value = nll.mean()
            else:
                values = self.rewards[constraint.name]
                known = [n for n, value in enumerate(values) if value is not None]
                c = torch.tensor([values[n] for n in known], dtype=torch.float64)
                others = (c.sum() - c) / (len(c) - 1)
                ratio = (self.token_log_likelihood(self.rollout) - self.old).exp()
                ratio = (ratio * (self.rollout.labels[:, 1:] != -100)).sum(1)
                value = ((c - others) * ratio[known]).mean() / self.divisor()
            loss = loss + self.last[k] * sign / scale * value
        return loss


def run(steps, kind, folder, tokenizer, model, **options):
    constraints = options.pop("constraints", None) or bounds()
    steps.trainer = trl_runs.make(
        kind, folder, tokenizer, model, constraints=constraints, base=steps.recorded, **options
    )
    steps.trainer.train()
    assert steps.found
    for ours, expected in steps.found:
        assert expected.norm() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    return steps.trainer


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRPOTrainer", {"loss_type": "grpo", "beta": 0.5, "scale_rewards": "none", "temperature": 0.7}),
        ("GRPOTrainer", {"loss_type": "dapo", "entropy_coef": 0.3, "gradient_accumulation_steps": 2}),
        ("RLOOTrainer", {"beta": 0.1, "gradient_accumulation_steps": 2, "normalize_advantages": True}),
        *(slow("GRPOTrainer", {"loss_type": kind}) for kind in ("bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")),
        *(
            slow(
                "GRPOTrainer",
                {"loss_type": kind, "importance_sampling_level": "sequence", "gradient_accumulation_steps": 2},
            )
            for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo")
        ),
        slow("GRPOTrainer", {"loss_type": "bnpo", "gradient_accumulation_steps": 2, "scale_rewards": "batch"}),
        slow("GRPOTrainer", {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"}),
        slow("GRPOTrainer", {"loss_type": "dapo", "gradient_accumulation_steps": 4, "steps_per_generation": 4}),
        slow("RLOOTrainer", {"beta": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_step_is_on_task_plus_barrier(kind, options, tmp_path, tokenizer, make_model, monkeypatch):
    if options.get("loss_type") == "cispo":
        options = {**options, "epsilon_high": 5.0}
    trainer = run(Steps(kind, monkeypatch), kind, tmp_path, tokenizer, make_model(gain=0.3), **options)
    assert trainer.l3m_optimizer.constraint_steps == 3


def general(count=6):
    return [{"input_ids": [3 + n, 4, 5 + n, 1], "labels": [-100, 4, 5 + n, 1]} for n in range(count)]


def test_samples_are_observed_once_however_often_they_are_used(tmp_path, tokenizer, make_model, monkeypatch):
    """Two optimizer steps from each sampling: the second is on the same gradient, with the ratios of then; mu and the estimates wait."""
    steps = Steps("GRPOTrainer", monkeypatch)
    constraints = (*bounds(), l3ms.DataNLL("general", general(), max=1.0, batch_size=3))
    trainer = run(
        steps, "GRPOTrainer", tmp_path, tokenizer, make_model(gain=0.3), constraints=constraints, num_iterations=2, max_steps=4,
        loss_type="grpo", epsilon=1e9, learning_rate=0.01,
    )  # fmt: skip
    assert steps.fresh == [True, False, True, False]
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert log[0]["l3m/mu"] == log[1]["l3m/mu"] > log[2]["l3m/mu"] == log[3]["l3m/mu"]
    assert log[0]["constraints/length/estimate"] == log[1]["constraints/length/estimate"]
    assert log[1]["constraints/general/estimate"] != log[2]["constraints/general/estimate"]
    assert trainer.l3m_optimizer.constraint_steps == 2
    schedule = trainer.l3m_optimizer.schedule
    assert schedule.steps == 2


def test_a_sampling_for_two_steps_is_observed_once(tmp_path, tokenizer, make_model, monkeypatch):
    trainer = trl_runs.make(
        "RLOOTrainer", tmp_path, tokenizer, make_model(gain=0.3), constraints=bounds(), steps_per_generation=4,
        gradient_accumulation_steps=2, max_steps=4, beta=0.0, per_device_train_batch_size=4,
    )  # fmt: skip
    fresh = []
    step = L3MOptimizer.step

    def seen(optimizer, closure=None):
        fresh.append(optimizer.estimates.pending is not None)
        step(optimizer)

    monkeypatch.setattr(L3MOptimizer, "step", seen)
    trainer.train()
    assert fresh == [True, False, True, False]
    assert len(trainer.last_rollout) == 16


def test_data_alone_bounds_a_trainer_that_samples(tmp_path, tokenizer, make_model, monkeypatch):
    steps = Steps("RLOOTrainer", monkeypatch)
    constraints = (l3ms.DataNLL("general", general(), max=1.0, batch_size=3), l3ms.Length(monitor=True))
    trainer = run(steps, "RLOOTrainer", tmp_path, tokenizer, make_model(gain=0.3), constraints=constraints, beta=0.0)
    assert "constraints/length/estimate" in trainer.state.log_history[0]
    assert float(steps.total) > 1
