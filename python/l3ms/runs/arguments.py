"""The trainer's arguments of a configuration."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from l3ms.config.errors import blame
from l3ms.config.optimizers import TORCH
from l3ms.config.run_config import RunConfig
from l3ms.config.train import TrainConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.training.arguments import L3MConfig
from l3ms.training.optimizers import torch_optimizer, try_step
from l3ms.training.trainer import L3MTrainer

# Its name in the transformers that vLLM 0.32 wants is another.
CHECKPOINTING: Any = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(L3MConfig)}
)


def is_on_cpu(config: RunConfig) -> bool:
    return config.train.device == "cpu" or not torch.accelerator.is_available()


def sharding(config: RunConfig, *, on_cpu: bool) -> dict[str, Any]:
    """`train.sharding` as transformers takes it.

    Raises:
        ConfigError: where nothing can be split.
    """
    if config.train.sharding is None:
        return {}
    if on_cpu:
        raise ConfigError("train.sharding", "fsdp2 needs GPUs, accelerate splits on no CPU; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ConfigError(
            "train.sharding",
            "fsdp2 splits a model over processes, and this is one; torchrun --nproc-per-node N -m l3ms train, or leave it out",
        )
    # Each process writes its part of a checkpoint: whole it would have to fit beside the first one's
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}


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
    checkpointing: dict[str, Any] = {CHECKPOINTING: train.activation_checkpointing}
    on_cpu = is_on_cpu(config)
    if train.autocast and not on_cpu and not is_torch_bf16_gpu_available():
        raise ConfigError(
            "train.autocast", "the device here does not compute in bfloat16; leave it out, or set train.device: cpu"
        )
    return L3MConfig(
        output_dir=str(Path(config.output) / "checkpoints"),
        solver=train.solver,
        dual_rate=train.dual_rate,
        penalty=train.penalty,
        mu=train.mu,
        mu_end=train.mu_end,
        smoothing=str(train.smoothing),  # a number in a text is one
        constraint_batch_size=train.constraint_batch_size,
        max_new_tokens=train.max_new_tokens,
        temperature=train.temperature,
        half_steps=train.half_steps,
        rollout_every=str(config.rollout.every),
        rollout_reuse=config.rollout.reuse,
        rollout_importance=config.rollout.importance,
        clipping=train.clipping,
        length_norm=train.length_norm,
        nonfinite=train.nonfinite,
        average_fraction=train.average_fraction,
        max_grad_norm=train.max_grad_norm,
        max_steps=train.iterations,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        **({"optim": train.optimizer} if train.optimizer not in TORCH else {}),
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        weight_decay=train.weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        **checkpointing,
        **sharding(config, on_cpu=on_cpu),
        bf16=train.autocast,
        use_cpu=on_cpu,  # without it processes on CPUs know nothing of each other
        ddp_timeout=train.timeout,
        agree_every=train.agree_every or 0,
        dataloader_pin_memory=torch.cuda.is_available() and not on_cpu,
        seed=config.seed,
        logging_steps=1,
        save_strategy="no" if train.save_steps is None else "steps",
        save_steps=train.save_steps or 1,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )


def named_optimizer(config: RunConfig) -> tuple[Any, dict[str, Any]] | None:
    """`train.optimizer` as the Trainer takes it where its arguments do not name it. Raises `ConfigError` for options
    that it does not have, or cannot step with."""
    train = config.train
    if train.optimizer not in TORCH or (train.optimizer == "adamw_fused" and not train.optimizer_options):
        return None
    settings = {"learning_rate": train.learning_rate, "betas": train.betas, "weight_decay": train.weight_decay}
    try:
        found = torch_optimizer(train.optimizer, train.optimizer_options, **settings)
        if train.optimizer_options:
            accelerator = None if is_on_cpu(config) else torch.accelerator.current_accelerator()
            try_step(found, accelerator or torch.device("cpu"))
        return found
    except ValueError as error:
        message = str(error).replace("optimizer_options: ", "optimizer_options ", 1)
        raise blame("train", TrainConfig.model_fields, message) from None


def make_optimizer(trainer: L3MTrainer) -> None:
    """The optimizer of a trainer, before it trains. Raises `ConfigError` where its package is not installed or too old, or it has nothing
    to step."""
    try:
        trainer.create_optimizer()
    except (ImportError, ValueError) as error:
        raise ConfigError("train.optimizer", " ".join(str(error).split())) from None
