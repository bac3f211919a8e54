"""Responses of the current policy, y ~ pi_theta(.|x), ready for rewards and for the head.

Sampling is `transformers.generate` with every filter off (no top-k, top-p, penalties): the gradient of the constraints is that of the
distribution that was sampled. Sequences come back right-padded whatever the tokenizer does, so that positions count from 0 as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from l3ms.constraints.async_rewards import begin, cancel, wait
from l3ms.constraints.constraint import Constraint
from l3ms.rollouts.shrinking import sample

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Rollout:
    """N responses and their prompts; the mapping interface holds what a model's forward takes."""

    prompts: list[Any]  # as given
    completions: list[Any]  # text; a list with one assistant message where the prompt is a list of messages, as in TRL
    input_ids: Tensor  # (N, L) prompt, response, padding
    attention_mask: Tensor  # (N, L)
    labels: Tensor  # (N, L) not shifted, -100 on prompts and padding
    lengths: Tensor  # (N,) int64, response tokens, the closing EOS included
    ended: Tensor  # (N,) bool, closed by EOS; a truncated response is not
    columns: dict[str, list[Any]] = field(default_factory=dict)  # more columns of the data, for the rewards
    host_lengths: list[int] = field(default_factory=list)  # `lengths`, with no device to wait for; made where not given
    temperature: float = 1.0  # of the sampling

    def __post_init__(self) -> None:
        if not self.host_lengths:
            object.__setattr__(self, "host_lengths", self.lengths.tolist())

    @property
    def scored(self) -> int:
        """Response tokens of all, which are what the head scores: for `L3MOptimizer.constraint_loss(..., scored=rollout.scored)`."""
        return self.scored_in(slice(None))

    def scored_in(self, part: slice) -> int:
        """Response tokens of a micro-batch."""
        return sum(self.host_lengths[part])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def rewards(self, constraints: Sequence[Constraint], model: Any = None) -> dict[str, list[float | None]]:
        """One value per response and constraint, by name; constraints without a function are left out (give those to `observe`).

        Asynchronous reward functions run at the same time as each other and as the others. NaN and inf are let through, to `observe`:
        there it is decided about them, and an error is one of all ranks.

        Args:
            model: the policy that was sampled, for constraints that need it (`KL`).

        Raises:
            ValueError: a reward of the wrong length, or no number: names the function and row.
        """
        own = [constraint for constraint in constraints if constraint.samples]
        answers: list[Any] = []
        try:
            for constraint in own:
                answers.append(begin(constraint.ask(self, model)))
            return {
                constraint.name: constraint.indicator(constraint.checked(wait(answer), len(self)))
                for constraint, answer in zip(own, answers, strict=True)
            }
        finally:
            cancel(answers)

    def reward_columns(self) -> dict[str, list[Any]]:
        """What reward functions get beside prompts and completions: the data's columns, `completion_ids` and `ended` (bool)."""
        return {**self.columns, "completion_ids": self.completion_ids(), "ended": self.ended.tolist()}

    def completion_ids(self) -> list[list[int]]:
        """The response tokens of each sequence."""
        return [ids[labels != -100].tolist() for ids, labels in zip(self.input_ids, self.labels, strict=True)]


@torch.no_grad()
def rollout(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int | None = None,
    prompt_ids: Sequence[Sequence[int]] | None = None,
    columns: dict[str, list[Any]] | None = None,
    **options: Any,
) -> Rollout:
    """Sample one response to each prompt. Draws from torch's global generator.

    Args:
        model: a transformers causal LM.
        prompts: texts, or lists of messages (through the tokenizer's chat template).
        max_new_tokens: a response that has not ended by then is truncated.
        temperature: of the sampling; give the same to the loss.
        batch_size: responses sampled at a time; by default all.
        prompt_ids: tokens of the prompts, where they are at hand; otherwise the tokenizer makes them.
        columns: more columns of the data, passed on to the rewards.
        options: more of `GenerationConfig`. With any of them the batch keeps its rows until the last response has ended.

    Raises:
        ValueError: no prompt, an empty one, no EOS token, or temperature or max_new_tokens not positive.
    """
    if not prompts:
        raise ValueError("rollout: prompts must not be empty")
    if not temperature > 0 or max_new_tokens < 1:
        raise ValueError(
            f"rollout: temperature and max_new_tokens must be positive, got {temperature} and {max_new_tokens}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("rollout: the tokenizer has no EOS token, so no response could end")
    if prompt_ids is None:
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for row, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"rollout: prompts[{row}] has no tokens")
    end = _end_tokens(model, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=pad,
        **options,
    )
    # generate() fills what `config` leaves open from the model's own settings: min_p, penalties, suppressed tokens, beams.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, own = model.training, inner.generation_config
    inner.generation_config = GenerationConfig()
    model.eval()
    try:
        responses: list[list[int]] = []
        for start in range(0, len(prompt_ids), batch_size or len(prompt_ids)):
            part = prompt_ids[start : start + (batch_size or len(prompt_ids))]
            responses += sample(model, part, pad, end, config, shrink=not options)
    finally:
        inner.generation_config = own
        model.train(training)

    sequences = [[*ids, *response] for ids, response in zip(prompt_ids, responses, strict=True)]
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad)
    labels = torch.full((len(sequences), width), -100)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    for row, (sequence, response) in enumerate(zip(sequences, responses, strict=True)):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, len(sequence) - len(response) : len(sequence)] = torch.tensor(response)
        attention_mask[row, : len(sequence)] = 1
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    device = model.device
    lengths = [len(response) for response in responses]
    return Rollout(
        prompts=list(prompts),
        completions=completions,
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        labels=labels.to(device),
        lengths=torch.tensor(lengths, device=device),
        ended=torch.tensor([response[-1] in set(end) for response in responses], device=device),
        columns=columns or {},
        host_lengths=lengths,
        temperature=temperature,
    )


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a prompt, ready to be continued."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
        return ids
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Chat models have several: the tokenizer's and those of the model's generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *own})
