"""What a run starts from: constraints, model, token rows and the trainer's arguments: all checked before a file is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from l3ms.config.constraints import DataNLLConfig, FunctionConfig, KLConfig, ReadyRewardConfig, RewardModelConfig
from l3ms.config.errors import blame
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints import rewards
from l3ms.constraints.constraint import Constraint, Length
from l3ms.constraints.data_nll import DataNLL
from l3ms.constraints.divergence import KL
from l3ms.constraints.reward_model import RewardModel
from l3ms.model.heads import fuse_head
from l3ms.runs.data import IGNORE_INDEX, Encoded, Example, encode, load_examples
from l3ms.runs.user_rewards import load_reward, try_reward
from l3ms.training.trainer import L3MConfig

PLAIN: dict[str, Any] = {
    "markup": False,
    "highlight": False,
    "soft_wrap": True,
}  # console.print of text that is not ours
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_constraints(config: RunConfig, console: Console, tokenizer: Any, model: Any) -> list[Constraint]:
    """The constraints, with all that they load: code (said to be run), reward models, data, the reference of a divergence.

    `tokenizer` and `model` are the policy's. Raises `ConfigError` naming the field.
    """
    built: list[Constraint] = []
    for index, item in enumerate(config.constraints):
        field = f"constraints.{index}"
        try:
            built.append(_build(config, field, item, console, tokenizer, model))
        except ConfigError:
            raise
        except ValueError as error:
            message = str(error).removeprefix(f"constraint {item.name!r}: ")
            raise blame(field, type(item).model_fields, message) from error
    return built


def _build(config: RunConfig, field: str, item: Any, console: Console, tokenizer: Any, model: Any) -> Constraint:
    options: dict[str, Any] = {
        name: getattr(item, name, None) for name in ("min", "max", "scale", "margin", "threshold", "monitor")
    }
    if isinstance(item, FunctionConfig):
        function, source = load_reward(f"{field}.function", item.function)
        console.print(f"Running code for constraint {item.name}: {source}", **PLAIN)
        return Constraint(item.name, function, **options)
    if isinstance(item, ReadyRewardConfig):
        return Constraint(item.name, rewards.make(item.reward, item.options), **options)
    if isinstance(item, RewardModelConfig):
        constraint = RewardModel(
            item.name, item.model, head=item.head, squash=item.squash, batch_size=item.batch_size,
            max_length=item.max_length, chat_template=item.chat_template,
            device="cpu" if config.train.device == "cpu" else None, **options,
        )  # fmt: skip
        constraint.load()
        return constraint
    if isinstance(item, DataNLLConfig):
        del options["threshold"]
        train, held_out = _constraint_rows(config, field, item, tokenizer, model, console)
        pad = tokenizer.pad_token_id or 0
        return DataNLL(item.name, train, held_out=held_out, batch_size=item.batch_size, pad_token_id=pad, **options)
    if isinstance(item, KLConfig):
        reference = item.reference or config.model
        constraint = KL(
            name=item.name, reference=reference, per_token=item.per_token, batch_size=item.batch_size, **options
        )
        constraint.prepare(model)
        return constraint
    return Length(name=item.name, **options)


def _constraint_rows(
    config: RunConfig, field: str, item: DataNLLConfig, tokenizer: Any, model: Any, console: Console
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Token rows of both sides of a data constraint: those of the half-steps, and those that are held out."""
    try:
        sides = load_examples(item.data, seed=config.seed)
        limit = min(item.data.max_length, _context(model))
        options = {"max_length": limit, "chat_template": item.data.chat_template}
        encoded = [encode(examples, tokenizer, **options) for examples in sides]
    except ConfigError as error:  # names data.train, data.evaluation
        raise ConfigError(f"{field}.{error.field}", error.message) from error
    for name, side in zip(("data.train", "data.evaluation"), encoded, strict=True):
        for note in side.notes(f"{field}.{name}"):
            console.print(note, **PLAIN)
        if not side.rows:
            raise ConfigError(f"{field}.{name}", f"no prompt fits in {limit - 1} tokens")
    return encoded[0].rows, encoded[1].rows


def try_rewards(config: RunConfig, constraints: list[Constraint], tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """Each reward function gets the first reference answers, as it will get the sampled ones."""
    prompts = [row["prompt"] for row in rows]
    answers = [[token for token in row["labels"] if token != IGNORE_INDEX] for row in rows]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {name: [row[name] for row in rows] for name in set(rows[0]) - {"input_ids", "labels", "prompt"}}
    columns["completion_ids"] = answers
    columns["ended"] = [tokens[-1] == tokenizer.eos_token_id for tokens in answers]
    blamed = {FunctionConfig: "function", RewardModelConfig: "model", ReadyRewardConfig: "reward"}
    for index, (item, constraint) in enumerate(zip(config.constraints, constraints, strict=True)):
        if type(item) in blamed:
            field, nonfinite = f"constraints.{index}.{blamed[type(item)]}", config.train.nonfinite
            try_reward(field, constraint, prompts, completions, columns, nonfinite=nonfinite)


def load_model(config: RunConfig, console: Console) -> tuple[Any, Any]:
    """Tokenizer and model, with adapters when asked for. Raises `ConfigError("model", ...)` in one line."""
    source = config.model
    if os.path.isabs(source) and not os.path.isdir(source):  # false where pathlib raises: a name that is too long
        raise ConfigError("model", f"no such folder: {source}")
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[config.train.dtype], **options)
    except Exception as error:  # transformers, the hub client and safetensors raise many kinds
        reason = " ".join(str(error).split())
        raise ConfigError("model", f"cannot load {source!r}: {reason[:300] or type(error).__name__}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError("model", f"the tokenizer of {source!r} has no end-of-sequence token, so no end to a response")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        console.print(f"The tokenizer has no padding token; using {tokenizer.eos_token!r}.", markup=False)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError("model", f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings")
    lora = config.train.lora
    if lora is not None:
        import peft

        adapters = peft.LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
            task_type=peft.TaskType.CAUSAL_LM,
        )  # fmt: skip
        try:
            model = peft.get_peft_model(model, adapters)
        except ValueError as error:
            raise ConfigError("train.lora", " ".join(str(error).split())[:300]) from error
    try:
        fuse_head(model)
    except ValueError as error:
        raise ConfigError("model", str(error)) from error
    return tokenizer, model


def _context(model: Any) -> int:
    """The tokens that a model takes."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def encode_sides(
    config: RunConfig, tokenizer: Any, model: Any, train: list[Example], held_out: list[Example], console: Console
) -> tuple[Encoded, Encoded]:
    """Token rows of both sides; what was cut or dropped is said. Prompts leave room for `max_new_tokens` responses."""
    context, room = context_room(config, model)
    sides = []
    for name, examples in (("data.train", train), ("held-out data", held_out)):
        encoded = encode(
            examples, tokenizer, max_length=min(config.data.max_length, context), max_prompt=room,
            chat_template=config.data.chat_template,
        )  # fmt: skip
        for note in encoded.notes(name):
            console.print(note, **PLAIN)
        if not encoded.rows:
            limit = min(config.data.max_length - 1, room)
            raise ConfigError(name if name == "data.train" else "data.evaluation", f"no prompt fits in {limit} tokens")
        sides.append(encoded)
    wanted = config.train.batch_size * config.train.gradient_accumulation
    if len(sides[0].rows) < wanted:
        raise ConfigError(
            "train.batch_size",
            f"batch_size x gradient_accumulation is {wanted}, but only {len(sides[0].rows)} rows are left to train on",
        )
    console.print(f"{len(sides[0].rows)} rows to train on, {len(sides[1].rows)} held out", highlight=False)
    return sides[0], sides[1]


def context_room(config: RunConfig, model: Any) -> tuple[int, int]:
    """(the model's context, what a response of `max_new_tokens` leaves of it for the prompt), in tokens."""
    context = _context(model)
    room = context - config.train.max_new_tokens
    if room < 1:
        wanted = f"must be below the model's context of {context} tokens, got {config.train.max_new_tokens}"
        raise ConfigError("train.max_new_tokens", wanted)
    return context, room


def training_arguments(config: RunConfig) -> L3MConfig:
    """The trainer's arguments; a linear schedule with a floor is a polynomial one of power 1."""
    train = config.train
    share = train.final_learning_rate_share
    schedules: dict[str, tuple[str, dict[str, float]]] = {
        "linear": ("polynomial", {"lr_end": share * train.learning_rate, "power": 1.0}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": share}),
        "constant": ("constant_with_warmup", {}),
    }
    kind, options = schedules[train.schedule]
    if train.schedule == "linear" and share == 1:  # transformers wants a decay to end below its start
        kind, options = schedules["constant"]
    warmup = train.warmup if train.warmup is not None else min(10, train.iterations // 10)
    on_cpu = train.device == "cpu" or not torch.cuda.is_available()
    return L3MConfig(
        output_dir=str(Path(config.output) / "checkpoints"),
        solver=train.solver,
        dual_rate=train.dual_rate,
        penalty=train.penalty,
        mu=train.mu,
        mu_end=train.mu_end,
        smoothing=train.smoothing,
        constraint_batch_size=train.constraint_batch_size,
        max_new_tokens=train.max_new_tokens,
        temperature=train.temperature,
        half_steps=train.half_steps,
        clipping=train.clipping,
        length_norm=train.length_norm,
        nonfinite=train.nonfinite,
        average_fraction=train.average_fraction,
        max_grad_norm=train.max_grad_norm,
        max_steps=train.iterations,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        weight_decay=train.weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        activation_checkpointing=train.activation_checkpointing,
        bf16=train.autocast,
        use_cpu=train.device == "cpu",
        dataloader_pin_memory=not on_cpu,
        seed=config.seed,
        logging_steps=1,
        save_strategy="no" if train.save_steps is None else "steps",
        save_steps=train.save_steps or 1,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )
