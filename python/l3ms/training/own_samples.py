"""Constraints on the samples that a trainer draws for its own task: TRL's GRPOTrainer and RLOOTrainer. Nothing is sampled twice.

One step is taken on the gradient of the whole barrier problem, divided by S = max(1, sum_i lambda_i):

    g = (1/S) grad[task] + sum_i (lambda_i / S) grad E[c_i]

The task's part is the trainer's own loss, all of it times 1/S: the policy loss, and what stands beside it (a KL penalty, an entropy bonus,
a router loss). The constraints' part goes into the same forward and backward as a part of the advantages. At the policy that has sampled
(ratio 1), each loss type of TRL has the gradient

    -(1/N) sum_n A_n / d_n  grad log pi(y_n|x_n)

of N responses y_n with |y_n| tokens in the loss, where the divisor d_n is

    GRPOTrainer     grpo, sapo              |y_n|, of each response by itself
                    bnpo                    the mean length in a micro-batch
                    dapo, cispo, vespo      the mean length in an optimizer step
                    dr_grpo                 max_completion_length
                    luspo                   1
    RLOOTrainer                             1

(cispo times its largest ratio where that is below 1. With importance_sampling_level="sequence" the gradient of a ratio is divided by |y_n|,
which the sum over tokens multiplies by: the same). What the barrier asks for is a
gradient, of the mean of each reward: its divisor must be one number for all responses, or a reward that depends on the length is driven
towards another mean (`L3MOptimizer`, length_norm). That number is d: the one of the loss type where it has one, else the mean length of the
responses that were sampled together. So with k_n = sum_i lambda_i (b_i - c_i(y_n)) and f_n = d_n / d the advantages are

    (A_n + f_n k_n) / S        with f_n = 1 for dapo, cispo, vespo, dr_grpo, luspo and RLOO,

which is (A + sum_i lambda_i (b_i - c_i)) / S but for losses that divide by other lengths. scale_rewards, normalize_advantages and
reward_weights make A what it is: they say what the task is, and k is not scaled with it.

Where samples are used for several optimizer steps (num_iterations, or steps_per_generation beyond gradient_accumulation_steps), k and S
stay what they were: the estimates hear of the samples once, in the first of those steps, and mu goes on with it. TRL's ratios and clips act
on the sum of task and constraints. Data constraints have no samples: their loss on the batch of then, times lambda / S, is backpropagated
before each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from l3ms.constraints.constraint import Constraint
from l3ms.constraints.data_nll import Batch, DataNLL, sequence_nll
from l3ms.rollouts.engines import Response
from l3ms.rollouts.rollout import Rollout
from l3ms.training.constraint_step import of_mean_length, rewards_of
from l3ms.training.given_trainers import GivenTrainer
from l3ms.training.trl_options import check_own_samples, check_sampling_of, check_tokenizer

OURS = "l3m_weights"  # (B,) beside the advantages in a batch: k / S
BY_LENGTH = ("grpo", "sapo")  # loss types that divide by each response's own length
BY_BATCH = ("bnpo",)  # and by the mean length of a micro-batch


class OwnSamples(GivenTrainer):
    """Mixed in before GRPOTrainer or RLOOTrainer."""

    half_steps = "joint"
    # TRL's
    args: Any
    model: Any
    num_iterations: int
    temperature: float
    eos_token_ids: list[int]
    _log_completion_extra: Any
    _log_metric: Any

    _prompt_ids: list[list[int]]  # of the samples that are being scored
    _weights: Tensor | None = None  # (B,) k / S of them
    _total: Tensor | None = None  # () float64, S of the samples that are in use
    _mean_length = 1.0  # of them, in tokens of the loss
    _data: Mapping[str, tuple[Batch, Tensor]] = MappingProxyType(
        {}
    )  # by data constraint, that in use, and d loss / d nll of its rows

    def _rows(self, given: dict[str, Any], prompts: Any) -> Any:
        if self.l3m.solver != "none":
            check_own_samples(self.given_name, self.l3m, given, prompts)
        return None

    def _check_samples(self, rows: Any) -> None:
        if self.l3m.solver != "none":
            check_sampling_of(self.args)
            check_tokenizer(self.processing_class)
        length = self.args.max_completion_length
        self.l3m = replace(self.l3m, max_new_tokens=length, temperature=self.args.temperature)  # for who reads them

    def _calls_head(self) -> bool:
        asks = any(type(constraint).ask is not Constraint.ask for constraint in self.constraints)
        return asks or any(c.data for c in self.constraints) or bool(self.watches)

    @property
    def generate_every(self) -> int:
        """Micro-batches from one sampling to the next."""
        return self.args.steps_per_generation * self.num_iterations

    def _iterations(self) -> int:
        """Those of which the estimates hear."""
        steps = super()._iterations()
        return -(
            -steps
            * self.args.gradient_accumulation_steps
            // max(self.generate_every, self.args.gradient_accumulation_steps)
        )

    def reward_arguments(self) -> dict[str, Any]:
        """TRL's own: what constraints log stands beside what its rewards log."""
        log = {"log_extra": self._log_completion_extra, "log_metric": self._log_metric}
        return {"trainer_state": self.state, **log}

    # ---- where samples are scored ----

    def _generate(self, prompts: list[Any]) -> Any:
        theirs: Any = super()
        found = theirs._generate(prompts)
        self._prompt_ids = found[0]
        return found

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        theirs: Any = super()
        rewards = theirs._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training and self.l3m_optimizer is not None:  # not in an evaluation
            self._observe(inputs, prompts, completions, completion_ids_list)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        theirs: Any = super()
        batch = theirs._generate_and_score_completions(inputs)
        if self._weights is not None:
            if "tool_mask" in batch:
                raise ValueError(
                    "rollout_func: its env_mask says that parts of the completions are not the policy's, but rewards and lengths count them"
                )
            batch[OURS], self._weights = self._weights, None
            mask = batch["completion_mask"]
            sums: Any = torch.stack([mask.sum(), mask.new_tensor(len(mask))]).float()
            sums = self.accelerator.reduce(sums, reduction="sum")
            tokens, count = sums.tolist()
            self._mean_length = max(tokens / count, 1.0)
        return batch

    def _observe(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> None:
        optimizer: Any = self.l3m_optimizer
        trainer: Any = self
        first = optimizer.estimates.pending is None  # of this optimizer step
        if any(constraint.samples for constraint in self.constraints):
            share = of_mean_length(trainer, [len(ids) for ids in completion_ids])
            with optimizer.estimates.errors_on_all_ranks():
                responses = self._responses(inputs, prompts, completions, completion_ids)
                rewards = self.last_rewards = rewards_of(trainer, responses, share)
            self._weights = optimizer.observe(rewards) * len(responses)
            self.last_rollout = responses
            self.fewer_samples.sampled = True
            tokens: Any = self.accelerator.reduce(
                torch.tensor(responses.scored, device=self.args.device), reduction="sum"
            )
            self.fewer_samples.sampled_tokens += int(tokens)
        if first:
            data = [constraint for constraint in self.constraints if isinstance(constraint, DataNLL)]
            self._data = {item.name: found for item in data if (found := self._observe_data(item))}
        self._total = optimizer.estimates.total

    def _responses(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Rollout:
        tokenizer: Any = self.processing_class
        end = {*self.eos_token_ids, tokenizer.pad_token_id}  # as TRL tells those that were cut
        answers = [Response(list(ids), ids[-1] in end, None) for ids in completion_ids]
        known = ("prompt", "completion", "completion_ids")
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in known}
        responses = Rollout.from_tokens(
            tokenizer, prompts, self._prompt_ids, answers, columns,
            temperature=self.temperature, device=self.args.device,
        )  # fmt: skip
        return replace(responses, completions=list(completions))

    def _observe_data(self, constraint: DataNLL) -> tuple[Batch, Tensor] | None:
        """The next batch of a data constraint, and what its rows weigh; None of a monitor."""
        optimizer: Any = self.l3m_optimizer
        batch = self.constraint_data[constraint.name].take()
        with optimizer.estimates.errors_on_all_ranks(), torch.no_grad(), self.compute_loss_context_manager():
            nll = constraint.losses(self.model_wrapped, batch, self.policy)
        nll = nll.detach().requires_grad_()
        loss = optimizer.barrier_loss({constraint.name: nll})
        return (batch, torch.autograd.grad(loss, nll)[0]) if loss.requires_grad else None

    # ---- where they are trained on ----

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        theirs: Any = super()
        weights = inputs.get(OURS)
        if self._total is None or not self.model.training:
            return theirs._compute_loss(model, inputs)
        total = self._total.float()
        if weights is not None:
            length = inputs["completion_mask"].sum(1).float()
            ours = weights * total * self._length_factor(length)
            inputs = {**inputs, "advantages": inputs["advantages"] + ours.to(inputs["advantages"])}
        return theirs._compute_loss(model, inputs) / total

    def _length_factor(self, length: Tensor) -> Tensor | float:
        """f_n, of (B,) tokens in the loss."""
        kind = getattr(self, "loss_type", None)  # RLOOTrainer has none
        if kind in BY_LENGTH:
            return length / self._mean_length
        return length.mean() / self._mean_length if kind in BY_BATCH else 1.0

    def add_constraint_gradient(self) -> None:
        """What is not in the advantages: the data constraints. Called before each step."""
        optimizer: Any = self.l3m_optimizer
        self.fewer_samples.sampled = optimizer.estimates.pending is not None
        if not self.fewer_samples.sampled and self._total is not None:
            optimizer.step_again(self._total)
        with self.phases.inside("constraint"):
            for batch, weights in self._data.values():
                with self.compute_loss_context_manager():
                    nll = sequence_nll(self.model_wrapped, batch)
                loss = (weights * nll).sum() * self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(loss)
