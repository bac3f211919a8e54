"""The gradient of the constraints, from fresh responses and from their data: what `L3MTrainer` puts into `.grad` before a constraint
half-step. All of them are observed before the one step and share its S."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from l3ms.barrier.importance import LEAST_SHARE, truncated
from l3ms.constraints.data_nll import Batches, DataNLL
from l3ms.constraints.divergence import KL, per_token, scaled
from l3ms.model.batches import further_columns, prompt_part
from l3ms.model.orders import PromptOrder
from l3ms.model.random_numbers import stream, undrawn
from l3ms.rollouts.engines import Engine
from l3ms.rollouts.rollout import Rollout
from l3ms.rollouts.sampling import rollout
from l3ms.training.engine_gap import EngineGap
from l3ms.training.fewer_samples import FewerSamples, Kept
from l3ms.training.importance_weights import engine_log_likelihood, policy_log_likelihood, share_of_all_ranks
from l3ms.training.phases import Phases
from l3ms.training.response_forwards import forward_of, parts_of
from l3ms.watching.watched import Watched

logger = logging.getLogger(__name__)


class Constrained(Watched, Protocol):
    """What the half-step takes of a training: `L3MTrainer` is one."""

    accelerator: Any
    model_wrapped: Any
    prompts: PromptOrder | None  # rows to be answered; None where no constraint needs responses
    constraint_data: dict[str, Batches]  # by constraint
    engine: Engine | None  # what samples; None: the policy itself
    fewer_samples: FewerSamples
    phases: Phases

    def compute_loss_context_manager(self) -> Any: ...

    def reward_arguments(self) -> dict[str, Any]:
        """What reward functions get of the training."""
        ...


def constraint_backward(trainer: Constrained) -> Rollout | None:
    """Backpropagate every constraint; gradients add up. -> the responses that were sampled, None where none were."""
    sampling = [constraint for constraint in trainer.constraints if constraint.samples]
    looking_on = all(constraint.monitor for constraint in sampling)
    with undrawn(trainer.policy.device, when=looking_on and bool(sampling)):
        responses = _sampled(trainer) if sampling else None
    _data(trainer)
    return responses


def _data(trainer: Constrained) -> None:
    """The next batch of each data constraint: its loss, weighted by its multiplier. That of a monitor is only measured."""
    optimizer = trainer.l3m_optimizer
    model: Any = trainer.model_wrapped
    assert optimizer is not None
    for constraint in trainer.constraints:
        if not isinstance(constraint, DataNLL):
            continue
        name, batches = constraint.name, trainer.constraint_data[constraint.name]
        if constraint.monitor:
            model.eval()
            with (
                undrawn(trainer.policy.device),
                optimizer.estimates.errors_on_all_ranks(),
                trainer.compute_loss_context_manager(),
                torch.no_grad(),
            ):
                nll = constraint.losses(model, batches.take(), trainer.policy)
            optimizer.barrier_loss({name: nll})
            continue
        model.train()
        with optimizer.estimates.errors_on_all_ranks(), trainer.compute_loss_context_manager():
            nll = constraint.losses(model, batches.take(), trainer.policy)
        loss = optimizer.barrier_loss({name: nll})
        trainer.accelerator.backward(loss * trainer.accelerator.gradient_accumulation_steps)


def rewards_of(trainer: Constrained, responses: Rollout, share: float) -> dict[str, list[float | None]]:
    """Of every constraint. The monitors come last, and draw nothing: what the others draw is what they draw without them.

    `share`: see `of_mean_length`.
    """
    policy, arguments = trainer.policy, trainer.reward_arguments()
    bounded = [constraint for constraint in trainer.constraints if not constraint.monitor]
    found = responses.rewards(bounded, policy, arguments)
    with undrawn(policy.device):
        monitors = [constraint for constraint in trainer.constraints if constraint.monitor]
        found |= responses.rewards(monitors, policy, arguments)
    found = {constraint.name: found[constraint.name] for constraint in trainer.constraints if constraint.name in found}
    return scaled(found, per_token(trainer.constraints), share)


def divergences_of_now(trainer: Constrained, responses: Rollout, share: float) -> dict[str, list[float | None]]:
    """Of responses that an earlier policy has drawn: `log pi - log pi_ref` is of the policy that the gradient is of."""
    bounded = [
        constraint for constraint in trainer.constraints if isinstance(constraint, KL) and not constraint.monitor
    ]
    return scaled(responses.rewards(bounded, trainer.policy), per_token(bounded), share)


def of_mean_length(trainer: Constrained, lengths: Sequence[int]) -> float:
    """The mean length of this rank's responses as a share of that of all ranks'; 1 where no `KL` is per token.

    All ranks ask before rewards are computed, whose errors they tell each other of in the next sum.
    """
    if trainer.args.world_size == 1 or not per_token(trainer.constraints):
        return 1.0
    own = torch.tensor([sum(lengths), len(lengths)], dtype=torch.float64, device=trainer.policy.device)
    tokens, count = trainer.accelerator.reduce(own, reduction="sum").tolist()
    return sum(lengths) / len(lengths) / (tokens / count)


def sampling_seed(trainer: Constrained) -> int | None:
    """Of an iteration, where there are several ranks, each of which makes its own stream of it. One takes the run's generator."""
    args = trainer.args
    return None if args.world_size == 1 else stream(args.seed, trainer.state.global_step)


def _sampled(trainer: Constrained) -> Rollout | None:
    """Responses to fresh prompts, or those of before once more; weigh them by their rewards, backpropagate in micro-batches.

    -> the responses, None where they are those of before.
    """
    optimizer, fewer = trainer.l3m_optimizer, trainer.fewer_samples
    assert optimizer is not None
    looking_on = all(constraint.monitor for constraint in trainer.constraints if constraint.samples)
    again, kept = _again(trainer), fewer.kept
    if again is not None and kept is not None:
        kept.uses += 1
        share = of_mean_length(trainer, kept.responses.host_lengths)
        with trainer.phases.inside("rewards"), optimizer.estimates.errors_on_all_ranks():
            rewards = kept.rewards | divergences_of_now(trainer, kept.responses, share)
        weights = optimizer.observe(rewards, kept.responses.lengths, importance=truncated(again), fresh=False)
        _backward(trainer, kept.responses, weights, fresh=False)
        return None
    fewer.kept = None
    responses = _answers(trainer)
    fewer.sampled = True
    fewer.sampled_tokens += _of_all_ranks(trainer, responses.scored)
    share = of_mean_length(trainer, responses.host_lengths)
    with trainer.phases.inside("rewards"), optimizer.estimates.errors_on_all_ranks():
        rewards = trainer.last_rewards = rewards_of(trainer, responses, share)
    importance = policy = drawn = None
    if not looking_on and (trainer.l3m.rollout_importance == "truncate" or fewer.reuse > 1):
        policy = drawn = policy_log_likelihood(trainer, responses)
        if trainer.l3m.rollout_importance == "truncate":
            with optimizer.estimates.errors_on_all_ranks():
                drawn = engine_log_likelihood(responses)
            importance = truncated(policy - drawn)
        if fewer.reuse > 1:
            fewer.kept = Kept(responses, rewards, drawn, uses=1)
    weights = optimizer.observe(rewards, responses.lengths, importance=importance)
    if policy is not None and drawn is not None and importance is not None:
        fewer.ess = share_of_all_ranks(trainer, policy - drawn)
    if not looking_on:
        _backward(trainer, responses, weights, fresh=True)
    return responses


def _again(trainer: Constrained) -> Tensor | None:
    """(N,) log-ratios of the rollout of before to the policy of now, where it is to be used again."""
    fewer = trainer.fewer_samples
    kept = fewer.kept
    if kept is None or kept.uses >= fewer.reuse:
        return None
    log_ratio = policy_log_likelihood(trainer, kept.responses) - kept.log_likelihood
    fewer.ess = share_of_all_ranks(trainer, log_ratio)
    return log_ratio if fewer.ess >= LEAST_SHARE else None


def _of_all_ranks(trainer: Constrained, count: int) -> int:
    if trainer.args.world_size == 1:
        return count
    return int(trainer.accelerator.reduce(torch.tensor(count, device=trainer.policy.device), reduction="sum"))


def _answers(trainer: Constrained) -> Rollout:
    """The policy's, to the next prompts."""
    l3m = trainer.l3m
    assert trainer.prompts is not None
    rows = trainer.prompts.take(l3m.constraint_batch_size)
    with trainer.phases.inside("sampling"):
        responses = rollout(
            trainer.policy,
            trainer.processing_class,
            [row["prompt"] for row in rows],
            prompt_ids=[prompt_part(row) for row in rows] if rows[0].keys() >= {"input_ids", "labels"} else None,
            chat_template=False,  # a text is one as it stands
            max_new_tokens=l3m.max_new_tokens,
            temperature=l3m.temperature,
            columns=further_columns(rows),
            engine=trainer.engine,
            seed=sampling_seed(trainer),
        )
    trainer.phases.sampled(responses.scored)
    if not trainer.state.global_step and not bool(responses.ended.any()):
        logger.warning(
            "iteration 1: all %d responses are cut at max_new_tokens=%d, so their lengths are those of cuts, and a bound on the length "
            "has no gradient until one ends by itself; raise max_new_tokens, or begin with a model that ends its responses",
            len(responses), l3m.max_new_tokens,
        )  # fmt: skip
    return responses


def _backward(trainer: Constrained, responses: Rollout, weights: Tensor, *, fresh: bool) -> None:
    """`fresh`: the policy of now has drawn them, and what its engine said of them can be compared."""
    trainer.model_wrapped.train()
    gap = EngineGap(responses) if fresh else None
    for part in parts_of(responses, _counted(trainer, weights), trainer.args.per_device_train_batch_size):
        output: Any = forward_of(trainer, responses, part, weights[part])
        if gap is not None:
            gap.add(part, output.token)
        loss = output.loss.sum()  # nn.DataParallel gives that of each part
        # accelerate divides by the accumulation steps of the task; these parts already add up to the whole
        trainer.accelerator.backward(loss * trainer.accelerator.gradient_accumulation_steps)
    if gap is not None:
        trainer.watched |= gap.log()


def _counted(trainer: Constrained, weights: Tensor) -> list[int]:
    """Rows with a gradient; ranks take as many forwards as the others, so there all. One stays in any case: with gradients of zero an
    optimizer does other things than with none."""
    if trainer.args.world_size > 1:
        return list(range(len(weights)))
    return weights.ne(0).nonzero()[:, 0].tolist() or [0]
