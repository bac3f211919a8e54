"""What of transformers' Trainer an `L3MTrainer` takes: each argument does what it says there, or is refused here, in one line.

The task loss and the constraints come from the fused head: it forms no logits, and knows no other loss. The half-steps are backward passes
each before its own `step()`: an optimizer that steps inside a backward cannot tell them apart. Everything else is the Trainer's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.debug_utils import DebugOption

from l3ms.barrier.optimizer import L3MOptimizer
from l3ms.constraints.constraint import Constraint
from l3ms.model.sharding import fully_sharded
from l3ms.rollouts.engines import Engine
from l3ms.rollouts.transformers_engine import TransformersEngine
from l3ms.training.arguments import L3MConfig
from l3ms.training.settings import L3MSettings

IN_BACKWARD = ("lomo", "adalomo")  # and those that end with "_layerwise": they step where a gradient is made


def check_options(args: Any, options: Mapping[str, Any]) -> None:
    """Before the Trainer is made. `options`: what it was given beside model and arguments. Raises `ValueError` naming the argument."""
    if not isinstance(args, L3MConfig):
        raise ValueError(f"args must be an l3ms.L3MConfig, got {type(args).__name__}")
    if options.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func is not taken: the fused head gives it no logits; override L3MTrainer.compute_loss for another task loss"
        )
    check_given(options, args.solver)
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor must be 0: the fused head forms no distribution to smooth towards, "
            f"got {args.label_smoothing_factor}"
        )
    names = args.label_names
    if names is not None and ("labels" not in names or (options.get("data_collator") is None and len(names) > 1)):
        raise ValueError(
            'label_names must be ["labels"], which the task loss is of (with others too where a data_collator gives them), '
            f"got {names}"
        )
    check_arguments(args)


def check_processing_class(given: Any) -> None:
    """Of what pads rows, or samples."""
    if given is not None and not hasattr(given, "pad_token_id"):
        raise ValueError(
            f"processing_class must be the model's tokenizer, got {type(given).__name__}: of a processor give its .tokenizer"
        )


def check_given(options: Mapping[str, Any], solver: str) -> None:
    """What a constrained trainer of any task is given beside its arguments."""
    if isinstance(rows := options.get("train_dataset"), Mapping):
        raise ValueError(f"train_dataset must be one data set, got several: {', '.join(map(repr, rows))}")
    if options.get("model_init") is not None:
        raise ValueError(
            "model_init is not taken: constraints are prepared for one model; give model=, and make a trainer for each run"
        )
    optimizer = (options.get("optimizers") or (None,))[0]
    if isinstance(optimizer, list | tuple) and solver == "none":
        raise ValueError(
            'optimizers: solver="none" steps one optimizer, got several; an L3MOptimizer steps them together'
        )
    if isinstance(optimizer, L3MOptimizer):
        raise ValueError(
            "optimizers: give the plain optimizer; the trainer wraps it in an L3MOptimizer with its constraints"
        )


def check_arguments(args: Any) -> None:
    """The arguments of a constrained trainer of any task."""
    launched = os.environ.get("WORLD_SIZE", "1")
    if args.world_size == 1 and launched != "1":
        raise ValueError(
            f"use_cpu must be True where {launched} processes are started on CPUs: without it accelerate takes each of them for one "
            "that is alone"
        )
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel must be False: it replaces the forward that the fused head is in")
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size must be False: a new attempt would go on with the weights and estimates of the one that "
            "failed; give per_device_train_batch_size"
        )
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        raise ValueError(
            "debug must not hold underflow_overflow: it stops at numbers that are not finite, and the fused head has such ones for logits"
        )
    kind = str(getattr(args.optim, "value", args.optim))
    if kind in IN_BACKWARD or kind.endswith("_layerwise"):
        raise ValueError(
            f"optim={kind!r} steps while gradients are made: clipping and the half-steps would not be seen"
        )


def check_functions(settings: L3MSettings, constraints: Sequence[Constraint]) -> None:
    """Raises `ValueError` where a training would be constrained by nothing, or by what it cannot evaluate."""
    if settings.solver == "none":
        return
    if all(constraint.monitor for constraint in constraints):
        what = "all are monitors" if constraints else "none given"
        raise ValueError(f'constraints: {what}; use solver="none" to fine-tune without')
    for constraint in constraints:
        if not constraint.samples and not constraint.data:
            raise ValueError(f"constraint {constraint.name!r} has no function: the trainer cannot evaluate it")


def check_parallelism(trainer: Any) -> None:
    """How the model is spread over processes, once the Trainer knows. FSDP2 and data parallelism are taken."""
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"fsdp is asked for, and accelerate does not shard on {trainer.args.device.type}: leave fsdp out (each process has the whole "
            "model), or split it by fully_shard in a loop of one's own with L3MOptimizer"
        )
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "fsdp_config: version 1 (FullyShardedDataParallel) flattens the weights, which norms, averages and KL are of; give "
            'fsdp_config={"version": 2}'
        )
    if next(fully_sharded(trainer.model), None) is not None:
        raise ValueError(
            'model is in parts already (fully_shard): give the whole model, and fsdp="full_shard" to have it split'
        )
    if trainer.is_deepspeed_enabled and trainer.l3m.solver != "none":
        raise ValueError(
            "deepspeed is not taken: its engine steps inside backward, where the two half-steps cannot be told apart; use FSDP, "
            'or solver="none"'
        )
    sizes = {name: getattr(trainer, f"get_{name}_size")() for name in ("tp", "cp", "sp")}
    split = {name: size for name, size in sizes.items() if size > 1}
    if split:
        raise ValueError(
            f"parallelism_config: sequences and heads must be whole on each process (data parallel, FSDP), got {split}"
        )


def needs_responses(args: L3MSettings, constraints: Sequence[Constraint]) -> bool:
    return args.solver != "none" and any(constraint.samples for constraint in constraints)


def check_rollout(args: L3MSettings, constraints: Sequence[Constraint], engine: Engine | None = None) -> None:
    """Raises `ValueError` for what is asked of sampled responses where none are trained on, or of the model itself, which samples as it is
    scored."""
    if args.solver == "none":
        return
    if any(item.samples and not item.monitor for item in constraints):
        if args.rollout_importance == "truncate" and (engine is None or isinstance(engine, TransformersEngine)):
            raise ValueError(
                "rollout_importance='truncate' is for an engine whose probabilities are not the model's, and the model samples itself: "
                "leave it out, or give engine="
            )
        return
    for name, default in (("rollout_reuse", 1), ("rollout_importance", "none")):
        if (value := getattr(args, name)) != default:
            raise ValueError(f"{name} is about sampled responses, and no constraint is on any, got {value!r}")


def check_sampling(constraints: Sequence[Constraint], tokenizer: Any, rows: Any) -> None:
    """Where responses are sampled: there is a tokenizer, and `rows` have prompts and can be looked up."""
    name = next(constraint.name for constraint in constraints if constraint.samples)
    if tokenizer is None:
        raise ValueError(
            f"processing_class is None: constraint {name!r} samples responses, which needs the model's tokenizer"
        )
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        kind = type(rows).__name__
        raise ValueError(f"prompts: constraint {name!r} samples responses to rows in random order, which {kind} "
                         "cannot give; give a list of rows as prompts=")  # fmt: skip
    check_rows("prompts", rows, ("input_ids", "labels", "prompt"))


def check_rows(where: str, rows: Any, names: Sequence[str] = ("input_ids", "labels")) -> None:
    """The first of them, where it can be looked up."""
    if rows is None or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__") or not len(rows):
        return
    if isinstance(rows, Mapping):  # several data sets to evaluate
        for name, part in rows.items():
            check_rows(f"{where}[{name!r}]", part, names)
        return
    row = rows[0]
    found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    missing = [name for name in names if not isinstance(row, Mapping) or name not in row]
    if missing:
        raise ValueError(
            f"{where}: rows must hold {', '.join(names)} (tokens, and labels that are -100 where not scored), got {found}; "
            "encode texts first"
        )
