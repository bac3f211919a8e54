"""The policy sampled where it is: `transformers.generate`, or a whole forward for each token.

Every filter is off (no top-k, top-p, penalties): the gradient of the constraints is that of the distribution that was sampled. Prompts go
in one batch, in batches of one length, or through a whole forward for each token: `ways` finds what a model needs to be sampled as it is
scored.

transformers' own continuous batching (`generate_batch`, 5.23) is not among the ways: on one core it takes twice as long as `shrinking`, 1.2
against 0.57 CPU seconds for 32 responses of 64 tokens of a model of 4 layers and 128 dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from l3ms.model.autocasting import outside_autocast
from l3ms.model.inside_adapters import inside_adapters
from l3ms.model.modes import evaluating
from l3ms.model.sharding import generating, is_sharded, most, reshard
from l3ms.rollouts.drawing import Drawn
from l3ms.rollouts.engines import Response
from l3ms.rollouts.packed_weights import is_large, packed_weights
from l3ms.rollouts.shrinking import sample
from l3ms.rollouts.stepping import sample_by_forward
from l3ms.rollouts.ways import way_of

# Options of `GenerationConfig` that leave what is sampled as it is, and those that are set here.
HOW = ("cache_implementation", "compile_config", "disable_compile", "use_cache")
SET = (
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams"),
    *("max_new_tokens", "eos_token_id", "pad_token_id", "return_dict_in_generate"),
)


class TransformersEngine:
    """Samples a transformers causal LM itself, so its weights are always those of now.

    The first sampling of a model takes a dozen forwards more: whether padding and cache leave its distribution as it is scored.
    """

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int | None = None, **options: Any):
        """
        Args:
            batch_size: responses sampled at a time; by default all.
            options: of `GenerationConfig`, how it computes: `use_cache`, `cache_implementation`, `compile_config`, `disable_compile`. With
                any of them the batch keeps its rows until the last response has ended.

        Raises:
            ValueError: another option, or a batch_size below 1.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"rollout: batch_size must be at least 1, got {batch_size}")
        _check_options(options)
        self.model, self.tokenizer, self.batch_size, self.options = model, tokenizer, batch_size, options

    def update(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        end: Sequence[int],
        generator: torch.Generator | None = None,
    ) -> list[Response]:
        """As `Engine.sample`, outside of any autocast. `generate` draws from torch's global generator: another one seeds that, for as long
        as is sampled."""
        with _drawing_from(generator, self.model.device):
            responses = self._sampled(prompts, max_new_tokens, temperature, end)
        closing = frozenset(end)
        return [Response(tokens, tokens[-1] in closing) for tokens in responses]

    def _sampled(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, end: Sequence[int]
    ) -> list[list[int]]:
        model, tokenizer, options = self.model, self.tokenizer, self.options
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with (
            _gathered(model),
            evaluating(model),
            _own_settings_aside(model),
            outside_autocast(model),
            generating(model),
        ):
            way = way_of(model, tokenizer, pad)
            if way.kind == "forward" and options:
                raise ValueError(
                    f"rollout: {type(inside_adapters(model)).__name__} is not sampled by generate, which has another distribution than "
                    f"its forward: leave out {', '.join(sorted(options))}"
                )
            # the largest of what Drawn leaves is what it has drawn
            drawn = Drawn(temperature) if model.device.type == "cpu" else None
            sampling: dict[str, Any] = {"do_sample": False}
            if drawn is None:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            ending = {"max_new_tokens": max_new_tokens, "eos_token_id": list(end), "pad_token_id": pad}
            config = GenerationConfig(repetition_penalty=1.0, num_beams=1, **sampling, **ending, **options)
            responses: list[list[int]] = [[] for _ in prompts]
            batches = list(_batches(prompts, self.batch_size or len(prompts), equal=way.kind == "equal lengths"))
            # Ranks with parts of one model make as many calls as the one with the most: again the last, not kept.
            batches += batches[-1:] * (most(model, len(batches)) - len(batches))
            in_step, room = is_sharded(model), is_large(model)
            packed = packed_weights(model, rows=max(map(len, batches)), steps=max_new_tokens * len(batches))
            with nullcontext() if in_step else packed:
                for rows in batches:
                    part = [prompts[row] for row in rows]
                    if way.kind == "forward":
                        stop = {"temperature": temperature, "max_new_tokens": max_new_tokens}
                        answers = sample_by_forward(model, part, pad, end, in_step=in_step, **stop)
                    else:
                        shrink = way.shrink and not options and not in_step
                        faster = {
                            "shrink": shrink,
                            "room": room,
                            "together": shrink and way.together,
                            "in_step": in_step,
                        }
                        answers = sample(model, part, pad, end, config, drawn=drawn, **faster)
                    for row, answer in zip(rows, answers, strict=True):
                        responses[row] = responses[row] or answer
        return responses


@contextmanager
def _gathered(model: Any) -> Iterator[None]:
    """What sampling gathers of a model in parts is split again."""
    try:
        yield
    finally:
        reshard(model)


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - vars(GenerationConfig()).keys())
    if unknown:
        raise ValueError(f"rollout: {', '.join(unknown)}: no argument of rollout, and no option of GenerationConfig")
    for name in sorted(options.keys() - set(HOW)):
        why = "is set by rollout" if name in SET else "would change what is sampled or given back"
        raise ValueError(
            f"rollout: {name} {why}: responses are of the model's own distribution, which the gradient is of; options are {', '.join(HOW)}"
        )
    if options.get("cache_implementation") == "quantized":
        raise ValueError(
            "rollout: cache_implementation='quantized' samples another distribution than the model's: leave it out"
        )


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """generate() fills what its configuration leaves open from the model's own settings: min_p, penalties, suppressed tokens, beams. Where
    peft's wrapper has its own, the model inside is given those."""
    owners = dict.fromkeys(
        [inside_adapters(model), *(module for module in model.modules() if "generation_config" in vars(module))]
    )
    kept = [(owner, owner.generation_config) for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, own in kept:
            owner.generation_config = own


@contextmanager
def _drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    if generator is None or generator is torch.default_generator:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _batches(prompts: Sequence[Sequence[int]], size: int, *, equal: bool) -> Iterator[list[int]]:
    """Rows that are sampled together: in order, or those with prompts of one length."""
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt) if equal else 0, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
