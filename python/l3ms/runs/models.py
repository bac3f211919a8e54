"""The policy of a run: a tokenizer and a model with its head fused, from a folder or a hub."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from l3ms.config.run_config import RunConfig
from l3ms.config.train import LoraConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.model.batches import Collator, prompt_part
from l3ms.model.heads import fuse_head
from l3ms.model.pretrained import is_installed, load_tokenizer, load_whole, reason
from l3ms.rollouts.positions import limits
from l3ms.rollouts.sampling import rollout
from l3ms.runs.terminal import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    source: str,
    *,
    dtype: str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    lora: LoraConfig | None = None,
    adapters: str | None = None,
    console: Console,
) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or hub id, with adapters when asked for. Raises `ConfigError` of `model`, `train.attn_implementation`
    or `train.lora`, in one line.

    `adapters`: a folder of trained ones, of `lora`, with the tokenizer; in the precision that they were trained in, whatever `dtype` is.
    """
    if source.lower().endswith(".gguf"):
        raise ConfigError("model", _gguf(source))
    if os.path.isfile(source):
        raise ConfigError("model", f"is a file, wanted the folder of a checkpoint, got {source}")
    if os.path.isabs(source) and not os.path.isdir(source):  # false where pathlib raises: a name that is too long
        raise ConfigError("model", f"no such folder: {source}")
    if trust_remote_code:
        say(console, f"Running the code of {source}")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = load_tokenizer(AutoTokenizer, adapters or source, **options)
        model: Any = _load(source, attn_implementation, dtype=DTYPES[dtype], **options)
    except ConfigError:
        raise
    except Exception as error:  # transformers, the hub client and safetensors raise many kinds
        raise ConfigError("model", f"cannot load {source!r}: {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError("model", f"the tokenizer of {source!r} has no end-of-sequence token, so no end to a response")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        say(console, f"The tokenizer has no padding token; using {tokenizer.eos_token!r}.")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError("model", f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings")
    if lora is not None:
        import peft

        refuse_adapters(source, model)
        settings = peft.LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
            task_type=peft.TaskType.CAUSAL_LM,
        )  # fmt: skip
        try:
            with (
                warnings.catch_warnings()
            ):  # peft 0.21 asks transformers 5.23 by a name that will go: of no use to who runs this
                warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
                model = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError("train.lora", " ".join(str(error).split())[:300]) from error
    if adapters is not None:
        _fill(model, adapters)
    try:
        fuse_head(model)
    except ValueError as error:
        raise ConfigError("model", str(error)) from error
    return tokenizer, model


def refuse_adapters(source: str, model: Any) -> None:
    """Raise `ConfigError` where the model that is to be trained came as adapters: new ones would replace them, or nothing be trained."""
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers' word for it
        raise ConfigError(
            "model", f"holds adapters of {model.config.name_or_path or 'a model'}, got {source}: merge them into it first (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)), and save the tokenizer there too"
        )  # fmt: skip


def options_of(config: RunConfig) -> dict[str, Any]:
    """How a run loads its policy, for `load_model`; adapters apart, which are made by a training and are in its folder then."""
    return {
        "dtype": config.train.dtype,
        "attn_implementation": config.train.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }


def _load(source: str, attn_implementation: str | None, **options: Any) -> Any:
    """The model, with the attention that is asked for or none."""
    if attn_implementation is None:
        return load_whole(AutoModelForCausalLM, source, **options)
    field = "train.attn_implementation"
    if not is_installed(attn_implementation):
        raise ConfigError(field, f"{attn_implementation} is not installed here, or has no device it runs on")
    try:
        model = load_whole(AutoModelForCausalLM, source, attn_implementation=attn_implementation, **options)
    except (ImportError, ValueError) as error:
        load_whole(AutoModelForCausalLM, source, **options)  # raises what has nothing to do with attention
        raise ConfigError(field, f"{attn_implementation} is not for {source!r}: {reason(error)}") from error
    found = model.config._attn_implementation
    if found != attn_implementation:  # transformers has one of its own for some models
        raise ConfigError(field, f"{source!r} computes {found} instead of {attn_implementation}")
    return model


def _fill(model: Any, folder: str) -> None:
    """Give the adapters of a model the values in a folder."""
    import peft
    from safetensors.torch import load_file

    try:
        values = load_file(os.path.join(folder, "adapter_model.safetensors"))
        if values.keys() != peft.get_peft_model_state_dict(model).keys():
            raise ValueError("they are not those of train.lora")
        peft.set_peft_model_state_dict(model, values)
    except Exception as error:  # of safetensors and torch, of many kinds
        raise ConfigError("model", f"cannot load the adapters in {folder!r}: {reason(error)}") from error


def _gguf(source: str) -> str:
    """How its quantised weights become a checkpoint that can be trained: transformers reads them, and refuses to save what it has read."""
    code = f'from l3ms.model.gguf_files import convert; convert({json.dumps(source)}, "checkpoint")'
    return (
        f"a GGUF file is for inference, got {source}: make a checkpoint of it in a new folder, {shlex.join(['python', '-c', code])} "
        "(needs the package gguf, of the extra real), and give that folder"
    )


@torch.no_grad()
def try_model(model: Any, tokenizer: Any, row: dict[str, Any], temperature: float) -> None:
    """The loss of one row and two sampled tokens, before anything is written: a configuration may describe a model that cannot compute."""
    try:
        with torch.random.fork_rng():
            batch = {
                name: value.to(model.device) for name, value in Collator(tokenizer.pad_token_id or 0)([row]).items()
            }
            model(**batch, use_cache=False)
            ids = [prompt_part(row)]
            rollout(model, tokenizer, [row["prompt"]], prompt_ids=ids, max_new_tokens=2, temperature=temperature)
    except (MemoryError, torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        raise ConfigError("model", f"cannot be used: {type(error).__name__}: {reason(error)}") from error


def context_of(model: Any) -> int:
    """The tokens that a model takes."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < 1:
        raise ConfigError("model", f"config.json: max_position_embeddings must be at least 1, got {context}")
    return context or 2**31


def context_room(model: Any, max_new_tokens: int) -> tuple[int, int]:
    """(the model's context, what a response of `max_new_tokens` leaves of it for the prompt), in tokens."""
    context = context_of(model)
    wanted = f"must be below the model's context of {context} tokens, got {max_new_tokens}"
    room = context - max_new_tokens
    for most, why in limits(model):
        if most < context:
            room, wanted = most - max_new_tokens, f"must be below {most} ({why}), got {max_new_tokens}"
    if room < 1:
        raise ConfigError("train.max_new_tokens", wanted)
    return context, room
