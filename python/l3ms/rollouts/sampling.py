"""`rollout`: responses of the current policy, y ~ pi_theta(.|x), ready for rewards and for the head.

Sampling is `transformers.generate` with every filter off (no top-k, top-p, penalties): the gradient of the constraints is that of the
distribution that was sampled. Sequences come back right-padded whatever the tokenizer does, so that positions count from 0 as in training.
Prompts go in one batch, in batches of one length, or through a whole forward for each token: `ways` finds what a model needs to be sampled
as it is scored.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from l3ms.model.inside_adapters import inside_adapters
from l3ms.rollouts.drawing import Drawn
from l3ms.rollouts.packed_weights import packed_weights
from l3ms.rollouts.prompts import Prompt, TemplateRefusal, as_turns, encode_prompt, template_options
from l3ms.rollouts.rollout import Rollout, check_columns
from l3ms.rollouts.shrinking import sample
from l3ms.rollouts.stepping import sample_by_forward
from l3ms.rollouts.ways import outside_autocast, way_of


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
    chat_template: bool = True,
    special_tokens: bool = False,
    **options: Any,
) -> Rollout:
    """Sample one response to each prompt. Draws from torch's global generator, outside of any autocast.

    The first call for a model takes a dozen forwards more: whether padding and cache leave its distribution as it is scored.

    Args:
        model: a transformers causal LM.
        prompts: texts, or lists of messages (through the tokenizer's chat template). Where the tokenizer has a template, a text becomes one
            user turn, and rewards get messages, as in a run from a YAML file.
        max_new_tokens: a response that has not ended by then is truncated.
        temperature: of the sampling; give the same to the loss.
        batch_size: responses sampled at a time; by default all.
        prompt_ids: tokens of the prompts, where they are at hand, and the prompts are what they were made of; otherwise the tokenizer makes
            them.
        columns: more columns of the data, a value per prompt, passed on to the rewards; those called `tools` and `chat_template_kwargs` the
            chat template gets as well.
        chat_template: False keeps a text prompt plain.
        special_tokens: leave special tokens in the text of the completions, the end token too. Rewards that want both versions take the
            argument `raw_completions`, which always has them.
        options: more of `GenerationConfig`. With any of them the batch keeps its rows until the last response has ended.

    Raises:
        ValueError: no prompt, an empty one or one that the chat template refuses, no EOS token, or temperature or max_new_tokens not
            positive; a column of another length, or with a name that reward functions know as something else; a
            model that cannot be sampled as it is scored.
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
        if chat_template:
            prompts = [as_turns(tokenizer, prompt) for prompt in prompts]
        prompt_ids = _encoded(tokenizer, prompts, columns or {})
    for row, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"rollout: prompts[{row}] has no tokens")
    end = _end_tokens(model, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # generate() fills what its configuration leaves open from the model's own settings: min_p, penalties, suppressed tokens, beams.
    inner = inside_adapters(model)
    training, own = model.training, inner.generation_config
    inner.generation_config = GenerationConfig()
    model.eval()
    try:
        with outside_autocast(model):
            way = way_of(model, tokenizer, pad)
            name = type(inner).__name__
            if way.kind != "padded" and _in_step(model):
                raise ValueError(
                    f"rollout: {name} cannot be sampled as it is scored from prompts of unlike lengths in one call of generate, and ranks "
                    "with shards of a model have to make the same calls; keep the whole model on each rank"
                )
            if way.kind == "forward" and options:
                raise ValueError(
                    f"rollout: {name} is not sampled by generate, which has another distribution than its forward: leave out "
                    f"{', '.join(sorted(options))}"
                )
            # the largest of what Drawn leaves is what it has drawn
            drawn = None if options or model.device.type != "cpu" else Drawn(temperature)
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if drawn is None else {}
            )
            ending = {"max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": pad}
            config = GenerationConfig(repetition_penalty=1.0, **sampling, **ending, **options)
            responses: list[list[int]] = [[] for _ in prompt_ids]
            batches = list(_batches(prompt_ids, batch_size or len(prompt_ids), equal=way.kind == "equal lengths"))
            with packed_weights(model, rows=max(map(len, batches)), steps=max_new_tokens * len(batches)):
                for rows in batches:
                    part = [prompt_ids[row] for row in rows]
                    if way.kind == "forward":
                        stop = {"temperature": temperature, "max_new_tokens": max_new_tokens}
                        answers = sample_by_forward(model, part, pad, end, **stop)
                    else:
                        shrink = way.shrink and not options
                        answers = sample(model, part, pad, end, config, drawn=drawn, shrink=shrink)
                    for row, answer in zip(rows, answers, strict=True):
                        responses[row] = answer
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
    raw = tokenizer.batch_decode(responses, skip_special_tokens=False)
    texts = raw if special_tokens else tokenizer.batch_decode(responses, skip_special_tokens=True)
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
        raw_completions=raw,
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


def _batches(prompts: Sequence[Sequence[int]], size: int, *, equal: bool) -> Iterator[list[int]]:
    """Rows that are sampled together: in order, or those with prompts of one length."""
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt) if equal else 0, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _in_step(model: Any) -> bool:
    """Whether ranks hold shards of one model, so that each takes every step of `generate` with the others."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return False
    sharded = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())
    return sharded or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Chat models have several: the tokenizer's and those of the model's generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *own})
