"""`rollout`: responses of the current policy, y ~ pi_theta(.|x), ready for rewards and for the head.

Who samples is an engine (`engines`): the model itself (`transformers_engine`), a vLLM (`vllm_engine`, `vllm_server`), or one's own.
Sequences come back right-padded whatever the tokenizer does, so that positions count from 0 as in training.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from l3ms.rollouts.engines import Response, as_engine, check_responses, name_of
from l3ms.rollouts.positions import check_lengths
from l3ms.rollouts.prompts import Prompt, TemplateRefusal, as_turns, encode_prompt, template_options
from l3ms.rollouts.rollout import Rollout, check_columns
from l3ms.rollouts.streams import own_stream
from l3ms.rollouts.transformers_engine import TransformersEngine


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
    engine: Any = None,
    update: bool = True,
    seed: int | None = None,
    process_group: Any = None,
    **options: Any,
) -> Rollout:
    """Sample one response to each prompt, outside of any autocast.

    One process draws from torch's global generator. Several draw each from a stream of its own, see `streams`: the same prompts get other
    answers on another rank. Ranks with parts of one model sample together, as many prompts as each has; all of them call.

    The first call for a model that samples itself takes a dozen forwards more: whether padding and cache leave its distribution as it is
    scored.

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
        engine: what samples, an `Engine` or a function with the arguments of its `sample`; by default the model itself.
        update: give the engine the model's weights first; False where it has them since an earlier call.
        seed: of the responses, whatever was drawn before; a loop that numbers its iterations (`seed=1000 * run + iteration`) samples the
            same when it is resumed there.
        process_group: of several, ranks with batches of their own, as of `L3MOptimizer`; the others, with which this rank shares one model
            by tensor parallelism, get the same answers to the same prompts.
        options: of `GenerationConfig`, how the model computes: `use_cache`, `cache_implementation`, `compile_config`, `disable_compile`.
            With any of them the batch keeps its rows until the last response has ended.

    Raises:
        ValueError: no prompt, an empty one, one that is neither text nor messages or that the chat template refuses; a tokenizer without an
            EOS token, or with a padding token beyond the vocabulary; temperature or max_new_tokens not positive, or more than the model's
            positions; a column of another length, or with a name that reward functions know as something else; tools or options of the
            template that are none; a model that cannot be sampled as it is scored; other options, or any with an engine; an engine that
            answers what the policy cannot.
    """
    _check_model(model)
    _check_tokenizer(model, tokenizer)
    prompts = _listed(prompts, encoded=prompt_ids is not None)
    check_columns("rollout", columns or {}, len(prompts))
    temperature, max_new_tokens = _limits(temperature, max_new_tokens)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"rollout: batch_size must be at least 1, got {batch_size}")
    if prompt_ids is None:
        if chat_template:
            prompts = [as_turns(tokenizer, prompt) for prompt in prompts]
        prompt_ids = _encoded(tokenizer, prompts, columns or {})
    vocabulary = vocabulary_of(model)
    prompt_ids = [_tokens(row, ids, vocabulary) for row, ids in enumerate(prompt_ids)]
    check_lengths(model, prompt_ids, max_new_tokens)
    stop = {"max_new_tokens": max_new_tokens, "end": _end_tokens(model, tokenizer)}
    asked = {**stop, "temperature": temperature, "generator": torch.default_generator}
    if engine is None:
        with own_stream(model, seed, process_group):
            sampler = TransformersEngine(model, tokenizer, batch_size=batch_size, **options)
            responses = sampler.sample(prompt_ids, **asked)
    else:
        engine = as_engine(engine)
        if options:
            raise ValueError(
                f"rollout: {', '.join(sorted(options))}: options are of transformers' generate, and {name_of(engine)} "
                "samples; leave them out"
            )
        if update:
            engine.update(model)
        responses: list[Response] = []
        size = batch_size or len(prompt_ids)
        with own_stream(model, seed, process_group):
            for start in range(0, len(prompt_ids), size):
                part = prompt_ids[start : start + size]
                found = engine.sample(part, **asked)
                responses += check_responses(engine, found, count=len(part), vocabulary=vocabulary, **stop)
    return Rollout.from_tokens(
        tokenizer, prompts, prompt_ids, responses, columns,
        temperature=temperature, special_tokens=special_tokens, device=model.device,
    )  # fmt: skip


def _check_model(model: Any) -> None:
    if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
        inside = ": give its .module" if hasattr(model, "module") else ""
        raise ValueError(f"rollout: model must be a transformers causal LM, got {type(model).__name__}{inside}")


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    if not hasattr(tokenizer, "eos_token_id"):
        inside = ": give its .tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise ValueError(
            f"rollout: tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}{inside}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("rollout: the tokenizer has no EOS token, so no response could end")
    check_padding("rollout", model, tokenizer)


def check_padding(where: str, model: Any, tokenizer: Any) -> None:
    """Raises `ValueError`, which begins with `where`, for a padding token that the model has no embedding for."""
    pad, vocabulary = tokenizer.pad_token_id, vocabulary_of(model)
    if pad is not None and not 0 <= pad < vocabulary:
        raise ValueError(
            f"{where}: the tokenizer's padding token {pad} is not in the model's vocabulary of {vocabulary}: enlarge that "
            "(model.resize_token_embeddings(len(tokenizer))), or take another (tokenizer.pad_token = tokenizer.eos_token)"
        )


def _limits(temperature: Any, max_new_tokens: Any) -> tuple[float, int]:
    given = f"got {temperature!r} and {max_new_tokens!r}"
    try:
        found = float(temperature), operator.index(max_new_tokens)
    except (TypeError, ValueError):
        raise ValueError(f"rollout: temperature must be a number and max_new_tokens a whole one, {given}") from None
    if not 0 < found[0] < math.inf or found[1] < 1:
        raise ValueError(f"rollout: temperature and max_new_tokens must be positive, {given}")
    return found


def _listed(prompts: Any, *, encoded: bool) -> list[Any]:
    if isinstance(prompts, (str, Mapping)) or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"rollout: prompts must be a list of texts or conversations, got {prompts!r:.80}: put it into a list"
        )
    prompts = list(prompts)  # a column of a table is a Series, or an array
    if not prompts:
        raise ValueError("rollout: prompts must not be empty")
    for row, prompt in enumerate([] if encoded else prompts):
        turns = isinstance(prompt, Sequence) and all(isinstance(turn, Mapping) for turn in prompt)
        if not isinstance(prompt, str) and not turns:
            raise ValueError(f"rollout: prompts[{row}] must be a text or a list of messages, got {prompt!r:.80}")
    return prompts


def vocabulary_of(model: Any) -> int:
    """Tokens that it has embeddings for; FSDP may have put these elsewhere."""
    return max(model.get_input_embeddings().weight.shape[0], model.config.get_text_config().vocab_size)


def _encoded(tokenizer: Any, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Tokens of the prompts; the chat template gets of the columns what is its own, as in training."""
    tokens = []
    for row, prompt in enumerate(prompts):
        try:
            options = template_options(columns, row)
        except ValueError as error:
            raise ValueError(f"rollout: prompts[{row}]: {error}") from None
        try:
            tokens.append(encode_prompt(tokenizer, prompt, **options))
        except TemplateRefusal as error:
            raise ValueError(f"rollout: prompts[{row}]: the chat template refuses it: {error}") from error
    return tokens


def _tokens(row: int, ids: Any, vocabulary: int) -> list[int]:
    """Of a prompt; arrays and tensors are lists then."""
    try:
        tokens = [operator.index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise ValueError(f"rollout: prompt_ids[{row}] must be token ids, got {ids!s:.80}") from None
    if not tokens:
        raise ValueError(f"rollout: prompts[{row}] has no tokens")
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        found = next(token for token in tokens if not 0 <= token < vocabulary)
        raise ValueError(
            f"rollout: prompts[{row}] has the token {found}, which is not in the model's vocabulary of {vocabulary}"
        )
    return tokens


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Chat models have several: the tokenizer's and those of the model's generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *own})
