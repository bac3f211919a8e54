"""cooper (https://github.com/cooper-org/cooper, PyPI `cooper-optim`) around a loop of one's own: a task loss and two bounds.

An iteration is one `roll()`: the task loss of a batch, responses to as many prompts as everybody gets, and a step of both sides. The mean
length has no gradient, so what the primal step sees is the surrogate `mean((length - mean of the others) log pi(response))`, whose
gradient is that of the mean length (REINFORCE, leave-one-out); the multipliers get the violation itself, `strict_violation`. Both are in
units of the middle of the range. The head is ours, which is less memory and time than logits; the learning rate warms up and falls to 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from experiments.versus.task import Tally, Task, Trained, encoded, examples, only, quiet
from l3ms.config.train import LoraConfig
from l3ms.model.averaging import trained
from l3ms.model.batches import CountingCollator, prompt_part
from l3ms.model.losses import scored_lengths, shift, task_weights
from l3ms.model.orders import PromptOrder
from l3ms.rollouts.rollout import Rollout
from l3ms.rollouts.sampling import rollout
from l3ms.runs.folder import save_weights
from l3ms.runs.models import load_model


def train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained:
    """setting: `multiplier_learning_rate`, and `kp` for cooper's nuPI controller (arXiv 2406.04558) instead of gradient ascent."""
    import cooper  # type: ignore[import-not-found]

    own = only(setting, "multiplier_learning_rate", "kp")
    transformers.set_seed(task.seed)
    lora = LoraConfig(r=task.lora_r, alpha=task.lora_alpha)
    tokenizer, model = load_model(task.model, dtype="float32", lora=lora, console=quiet())
    problem = _problem(cooper, task, model, tokenizer)
    parameters = [parameter for _, parameter in trained(model)]
    primal = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)

    def clip(*_: Any) -> None:  # `roll` has no place for it
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    primal.register_step_pre_hook(clip)
    schedule = transformers.get_linear_schedule_with_warmup(primal, max(1, task.iterations // 10), task.iterations)
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem, primal_optimizers=primal, dual_optimizers=_dual(cooper, problem, own)
    )
    for _ in range(task.iterations):
        optimizer.roll()
        schedule.step()
        problem.tally.log[-1]["multipliers"] = problem.length.multiplier.weight.tolist()
    save_weights(folder, "weights", model, tokenizer)
    return Trained(folder / "weights", problem.tally.tokens, problem.tally.log)


def _dual(cooper: Any, problem: Any, own: Mapping[str, Any]) -> torch.optim.Optimizer:
    options = {"lr": float(own["multiplier_learning_rate"]), "maximize": True}
    if "kp" in own:
        return cooper.optim.nuPI(problem.dual_parameters(), Kp=torch.tensor(float(own["kp"])), **options)
    return torch.optim.SGD(problem.dual_parameters(), **options)


def _problem(cooper: Any, task: Task, model: Any, tokenizer: Any) -> Any:
    """The constrained problem, a `cooper.ConstrainedMinimizationProblem`: that class is there when cooper is."""
    rows = encoded(task, tokenizer, examples(task)[0]).rows
    collate = CountingCollator(tokenizer.pad_token_id)

    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self) -> None:
            super().__init__()
            self.tasks, self.prompts = (PromptOrder(rows, seed=2 * task.seed + i, rank=0, world=1) for i in (0, 1))
            self.tally = Tally()
            self.length = cooper.Constraint(
                constraint_type=cooper.ConstraintType.INEQUALITY,
                formulation_type=cooper.formulations.Lagrangian,
                multiplier=cooper.multipliers.DenseMultiplier(num_constraints=2),
            )

        def compute_cmp_state(self) -> Any:
            batch = collate(self.tasks.take(task.batch_size))
            weights = task_weights(scored_lengths(shift(batch["labels"])))
            loss = model(**batch, seq_weight=weights, use_cache=False).loss
            asked = self.prompts.take(task.responses)
            responses = rollout(
                model, tokenizer, [row["prompt"] for row in asked], prompt_ids=[prompt_part(row) for row in asked],
                max_new_tokens=task.max_new_tokens,
            )  # fmt: skip
            self.tally.add(responses.host_lengths, loss=float(loss.detach()))
            mean, surrogate = responses.lengths.float().mean(), mean_length(model, responses)
            state = cooper.ConstraintState(
                violation=torch.stack([task.min - surrogate, surrogate - task.max]) / task.unit,
                strict_violation=torch.stack([task.min - mean, mean - task.max]) / task.unit,
            )
            return cooper.CMPState(loss=loss, observed_constraints={self.length: state})

    model.train()
    return Problem()


def mean_length(model: Any, responses: Rollout) -> Tensor:
    """() with the gradient of the mean length, and the value of nothing in particular."""
    lengths = responses.lengths.float()
    advantage = (lengths - lengths.mean()) * len(lengths) / (len(lengths) - 1)  # minus the mean of the others
    return model(
        input_ids=responses.input_ids, attention_mask=responses.attention_mask, labels=responses.labels,
        seq_weight=-advantage / len(lengths), scored=responses.scored, use_cache=False,
    ).loss  # fmt: skip
