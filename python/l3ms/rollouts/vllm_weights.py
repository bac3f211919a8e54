"""The policy as a vLLM can load it, and the proof that it has.

A vLLM builds the architecture that `config.json` names with code of its own, and loads the weights by their names in a checkpoint. So the
policy must be that architecture, adapters merged; it goes there as a checkpoint, in memory where the system has a file system of it. vLLM's
own way of taking new weights (`reload_weights`, layer by layer) makes anew what its kernels made of the old ones; a plain `load_weights`
does not.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from l3ms.model.autocasting import outside_autocast
from l3ms.model.inside_adapters import inside_adapters
from l3ms.model.modes import evaluating
from l3ms.model.random_numbers import undrawn
from l3ms.model.sharding import in_shards
from l3ms.rollouts.engines import Engine, Response, name_of
from l3ms.rollouts.stepping import scored_logits
from l3ms.rollouts.ways import STRIDE

MEMORY = "/dev/shm"
# Every filter off: what is sampled is softmax(logits / temperature), and `end` alone ends it.
UNFILTERED: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
}
COLDEST = 0.01  # below, vLLM samples at this temperature, or takes the largest
FAR = 0.5  # nats between the mean log-likelihoods per token that no precision explains
PROVEN = 2  # first updates, after which its numbers are compared: a start, and a reload
PROBE = 8  # tokens of the responses that are compared


def check_temperature(engine: Engine, temperature: float) -> None:
    if temperature < COLDEST:
        raise ValueError(
            f"{name_of(engine)}: temperature must be at least {COLDEST}, below which vLLM samples at another one, got {temperature:g}"
        )


def seeds(count: int, generator: torch.Generator) -> list[int]:
    """One for each prompt: a response does not depend on what else is in the batch."""
    return torch.randint(2**31 - 1, (count,), generator=generator, device=generator.device).tolist()


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Where a checkpoint is put that a vLLM of this machine reads at once."""
    inside = MEMORY if os.path.isdir(MEMORY) and os.access(MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="l3ms-policy-", dir=inside)


@torch.no_grad()
def save_policy(engine: Engine, model: Any, folder: str | Path) -> None:
    """Write the policy as a checkpoint, its adapters merged into a copy.

    Raises:
        ValueError: it is not what vLLM would make of its configuration, by name.
    """
    where = name_of(engine)
    if any(in_shards(p) or p.is_meta for p in model.parameters()):
        raise ValueError(f"{where}: this process has a part of the weights only; keep the whole model on each rank")
    if hasattr(model, "get_base_model"):
        model = _merged(where, model)
    check_architecture(where, model)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one for each iteration
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def _merged(where: str, model: Any) -> Any:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{where}: a learned prefix cannot be merged into the weights; use LoRA, or the engine transformers"
        )
    with undrawn(model.device):
        merged: Any = copy.deepcopy(model)
    try:
        return merged.merge_and_unload()
    except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: the adapters cannot be merged into the weights: {said}") from error


def tied(model: Any) -> bool:
    """Whether the head's weights are the embeddings'."""
    inner = inside_adapters(model)
    return inner.get_output_embeddings().weight is inner.get_input_embeddings().weight


def check_architecture(where: str, model: Any) -> None:
    """ValueError where the weights are not those of the architecture that the configuration names."""
    inner = inside_adapters(model)
    with torch.device("meta"):
        fresh = type(inner)(copy.deepcopy(inner.config))
    kind = type(inner).__name__
    own, plain = ({name: tuple(t.shape) for name, t in part.state_dict().items()} for part in (inner, fresh))
    for name in sorted(own.keys() | plain.keys()):
        if own.get(name) != plain.get(name):
            ours, theirs = (f"has {shapes[name]}" if name in shapes else "has none" for shapes in (own, plain))
            raise ValueError(
                f"{where}: {name}: the model {ours}, a {kind} of its configuration {theirs}, and that is what vLLM makes; use the "
                "engine transformers"
            )
    own_head, wanted = tied(inner), tied(fresh)
    if own_head != wanted:
        raise ValueError(
            f"{where}: the model's head is {'' if own_head else 'not '}its embeddings, that of a {kind} of its configuration is "
            f"{'' if wanted else 'not '}(tie_word_embeddings), and that is what vLLM makes; use the engine transformers"
        )


@torch.no_grad()
def prove(engine: Engine, model: Any, *, end: Sequence[int] = ()) -> None:
    """Sample a few tokens and compare their log-likelihoods with the model's own.

    Raises:
        ValueError: they are farther apart than any precision explains: other weights, or another architecture.
    """
    size = model.get_input_embeddings().weight.shape[0]
    prompts = [[STRIDE * (3 * row + i + 1) % size for i in range(4 + row)] for row in range(3)]
    generator = torch.Generator().manual_seed(0)
    found = engine.sample(prompts, max_new_tokens=PROBE, temperature=1.0, end=end, generator=generator)
    apart = torch.cat(gaps(model, prompts, found)).abs().mean().item()
    if not apart <= FAR:
        raise ValueError(
            f"{name_of(engine)}: its log-likelihoods are {apart:.2g} nats per token from the model's: it has other weights, or computes "
            "another model; use the engine transformers"
        )


@torch.no_grad()
def gaps(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Response], temperature: float = 1.0
) -> list[Tensor]:
    """Of each response (T,) what the engine's log-likelihoods are above the model's own."""
    rows = [[*prompt, *response.tokens] for prompt, response in zip(prompts, responses, strict=True)]
    with evaluating(model), outside_autocast(model):
        logits = scored_logits(model, rows, 0)
    found = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, tokens = len(prompt) - 1, torch.tensor(response.tokens, device=logits.device)
        own = (logits[row, start : start + len(tokens)].double() / temperature).log_softmax(-1)
        own = own.gather(1, tokens[:, None])[:, 0].cpu()
        found.append(torch.tensor(response.log_likelihood, dtype=torch.float64) - own)
    return found
