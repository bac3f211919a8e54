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
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


def number(prompts, completions, number, **columns):
    """A reward of a column of the data, and of the response; none for one prompt."""
    return [None if n == 3 else len(text) % 3 + 0.1 * n for n, text in zip(number, completions, strict=True)]


CONSTRAINTS = (l3ms.Length(max=5), l3ms.Constraint("number", number, min=1.5, max=2.5), l3ms.KL(max=0.1))


class Steps:
    """Of a trainer: before each step, the gradient that it is made with and the one that it should be."""

    def __init__(self, kind, monkeypatch):
        self.base = getattr(trl, kind)
        self.batches: list[dict] = []  # since the last step
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.trainer: Any = None
        self.multipliers: list[torch.Tensor] = []
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
        kept = [p.grad for p in trainer.model.parameters()]
        trainer.model.zero_grad()
        for batch in self.batches:  # as TRL made it: its advantages are the task's
            loss = self.base._compute_loss(trainer, trainer.model, batch)
            (loss if self.base.__name__ == "GRPOTrainer" else loss / len(self.batches)).backward()
        (self.barrier(optimizer.estimates) / self.divisor()).backward()
        self.batches = []
        self.found.append((ours, self.gradient() / self.total))
        for p, grad in zip(trainer.model.parameters(), kept, strict=True):
            p.grad = grad

    def divisor(self):
        kind = getattr(self.trainer, "loss_type", "rloo")
        of = {"rloo": 1, "luspo": 1, "dr_grpo": self.trainer.max_completion_length}
        return of.get(kind, float(self.rollout.lengths.float().mean()))

    def barrier(self, estimates):
        """sum_k lambda_k sign_k / scale_k mean_n (c_n - b_n) log pi(y_n), with b_n the mean of the others that have a value."""
        inputs = {name: self.rollout[name] for name in ("input_ids", "attention_mask")}
        logits = self.trainer.model(**inputs).logits[:, :-1] / self.rollout.temperature
        labels = self.rollout.labels[:, 1:]
        token = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        log_pi = (token * (labels != -100)).sum(1).double()
        loss = torch.zeros((), dtype=torch.float64)
        for k, owner in enumerate(estimates.owner):
            constraint = estimates.constraints[owner]
            values = self.rewards[constraint.name]
            known = [n for n, value in enumerate(values) if value is not None]
            c = torch.tensor([values[n] for n in known], dtype=torch.float64)
            others = (c.sum() - c) / (len(c) - 1)
            sign, _, scale = estimates.bounds.table[k, :3]
            loss = loss + self.last[k] * sign / scale * ((c - others) * log_pi[known]).mean()
        return loss


def run(steps, kind, folder, tokenizer, model, **options):
    constraints = options.pop("constraints", CONSTRAINTS)
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
