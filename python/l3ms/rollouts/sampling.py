"""`rollout`: responses of the current policy, y ~ pi_theta(.|x), ready for rewards and for the head.

Sampling is `transformers.generate` with every filter off (no top-k, top-p, penalties): the gradient of the constraints is that of the
distribution that was sampled. Sequences come back right-padded whatever the tokenizer does, so that positions count from 0 as in training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from l3ms.rollouts.prompts import Prompt, TemplateRefusal, encode_prompt, template_options
from l3ms.rollouts.rollout import Rollout, check_columns
from l3ms.rollouts.shrinking import sample


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
        columns: more columns of the data, a value per prompt, passed on to the rewards; those called `tools` and `chat_template_kwargs` the
            chat template gets as well.
        options: more of `GenerationConfig`. With any of them the batch keeps its rows until the last response has ended.

    Raises:
        ValueError: no prompt, an empty one or one that the chat template refuses, no EOS token, or temperature or max_new_tokens not
            positive; a column of another length, or with a name that reward functions know as something else.
    """
    if not prompts:
        raise ValueError("rollout: prompts must not be empty")
    check_columns("rollout", columns or {}, len(prompts))
    if not temperature > 0 or max_new_tokens < 1:
        raise ValueError(
            f"rollout: temperature and max_new_tokens must be positive, got {temperature} and {max_new_tokens}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("rollout: the tokenizer has no EOS token, so no response could end")
    if prompt_ids is None:
        prompt_ids = _encoded(tokenizer, prompts, columns or {})
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


def _encoded(tokenizer: Any, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Tokens of the prompts; the chat template gets of the columns what is its own, as in training."""
    tokens = []
    for row, prompt in enumerate(prompts):
        try:
            tokens.append(encode_prompt(tokenizer, prompt, **template_options(columns, row)))
        except TemplateRefusal as error:
            raise ValueError(f"rollout: prompts[{row}]: the chat template refuses it: {error}") from error
    return tokens


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Chat models have several: the tokenizer's and those of the model's generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *own})
