"""Execute a run: check everything, train, sample fresh responses on held-out prompts, and leave the run folder.

Nothing is written before the configuration, the data, the model and the reward functions have been loaded and tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from l3ms.config import FunctionConfig, RunConfig
from l3ms.constraints import Constraint, Length
from l3ms.data import IGNORE_INDEX, Collator, Encoded, Example, encode, load_examples
from l3ms.evaluation import evaluate
from l3ms.progress import ProgressCallback
from l3ms.report import summary_table, write_report
from l3ms.run_folder import MetricsWriter, check_output, prepare_output, save_weights, write_config
from l3ms.trainer import L3MConfig, L3MTrainer
from l3ms.user_rewards import load_reward, try_reward
from l3ms.yaml_reader import ConfigError

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def execute(
    config: RunConfig, *, overwrite: bool = False, allow_code: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run `config` and return its report. Raises `ConfigError` for bad input, before the output folder is touched."""
    start = time.monotonic()
    console = console or Console()
    folder = Path(config.output)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_output(folder, overwrite=overwrite, inputs=_local_inputs(config))
    _check_code(config, allow_code)
    train_examples, held_out = load_examples(config.data, seed=config.seed)
    constraints = _constraints(config, console)
    transformers.set_seed(config.seed)
    tokenizer, model = load_model(config, console)
    train, evaluation = _encode(config, tokenizer, model, train_examples, held_out, console)
    _try_rewards(config, constraints, tokenizer, train.rows[:4])
    arguments = training_arguments(config)

    prepare_output(folder)
    write_config(folder, config.model_dump())
    bounds = [{"name": item.name, "min": item.min, "max": item.max} for item in config.constraints]
    metrics = MetricsWriter(folder / "metrics.jsonl")
    progress = ProgressCallback(bounds, title=_title(config), console=console)
    trainer = L3MTrainer(
        model=model,
        args=arguments,
        train_dataset=train.rows,
        data_collator=Collator(tokenizer.pad_token_id),
        constraints=constraints,
        processing_class=tokenizer,
        callbacks=[metrics, progress, *_tensorboard(config, folder)],
    )
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    sample = _evaluator(config, tokenizer, evaluation, constraints, console)

    summaries: dict[str, dict[str, Any]] = {}
    lengths: dict[str, list[int]] = {}
    stage = "no weights yet"
    try:
        if config.evaluate.initial:
            summaries["initial"], lengths["initial"] = sample(trainer.model, "before training")
        trainer.train()
        save_weights(folder, "model", trainer.model, tokenizer)
        stage = f"the last weights in {folder / 'model'}"
        averaged = trainer.averaged_model()
        save_weights(folder, "average", averaged, tokenizer)
        stage = f"the weights in {folder / 'model'} and {folder / 'average'}"
        summaries["last"], lengths["last"] = sample(trainer.model, "last iterate")
        summaries["average"], lengths["average"] = sample(averaged, "averaged weights")
    except KeyboardInterrupt:
        metrics.flush()
        raise KeyboardInterrupt(f"kept: {metrics.iterations} iterations in {metrics.path}, {stage}") from None
    finally:
        progress.close()
    report = _report(config, trainer, bounds, start) | summaries
    picture = write_report(folder, report, lengths)
    console.print(summary_table(report))
    console.print(f"Report and picture: {picture.with_suffix('.json')}, {picture}", highlight=False, soft_wrap=True)
    return report


def _title(config: RunConfig) -> str:
    return "L3M" if config.train.solver == "barrier" else "SFT"


def _local_inputs(config: RunConfig) -> dict[str, str]:
    paths = {"model": config.model, "data.train": config.data.train, "data.evaluation": config.data.evaluation}
    return {field: path for field, path in paths.items() if path is not None and Path(path).is_absolute()}


def _check_code(config: RunConfig, allow_code: bool) -> None:
    if config.runs_code and not allow_code:
        field, _, what = config.runs_code[0].partition(": ")
        raise ConfigError(field, f"{what} would run code; add --allow-code if you trust it")


def _constraints(config: RunConfig, console: Console) -> list[Constraint]:
    """The constraints; each reward function is imported, and said to be."""
    built: list[Constraint] = []
    for index, item in enumerate(config.constraints):
        options = {"min": item.min, "max": item.max, "scale": item.scale, "margin": item.margin}
        field = f"constraints.{index}"
        try:
            if isinstance(item, FunctionConfig):
                function, source = load_reward(f"{field}.function", item.function)
                console.print(f"Running code for constraint {item.name}: {source}", **PLAIN)
                built.append(Constraint(item.name, function, **options))
            else:
                built.append(Length(name=item.name, **options))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(field, str(error)) from error
    return built


def _try_rewards(config: RunConfig, constraints: list[Constraint], tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """Each reward function gets the first reference answers, as it will get the sampled ones."""
    scored = [[token for token in row["labels"] if token != IGNORE_INDEX] for row in rows]
    completions = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in scored]
    for index, (item, constraint) in enumerate(zip(config.constraints, constraints, strict=True)):
        if isinstance(item, FunctionConfig):
            try_reward(f"constraints.{index}.function", constraint, [row["prompt"] for row in rows], completions)


def load_model(config: RunConfig, console: Console) -> tuple[Any, Any]:
    """Tokenizer and model, with adapters when asked for. Raises `ConfigError("model", ...)` in one line."""
    source = config.model
    if Path(source).is_absolute() and not Path(source).is_dir():
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
    return tokenizer, model


def _encode(
    config: RunConfig, tokenizer: Any, model: Any, train: list[Example], held_out: list[Example], console: Console
) -> tuple[Encoded, Encoded]:
    """Token rows of both sides; what was cut or dropped is said. Prompts leave room for `max_new_tokens` responses."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    room = context - config.train.max_new_tokens
    if room < 1:
        wanted = f"must be below the model's context of {context} tokens, got {config.train.max_new_tokens}"
        raise ConfigError("train.max_new_tokens", wanted)
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
    console.print(f"{len(sides[0].rows)} rows to train on, {len(sides[1].rows)} held out", highlight=False)
    return sides[0], sides[1]


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
        output_dir=config.output,
        solver=train.solver,
        mu=train.mu,
        mu_end=train.mu_end,
        smoothing=train.smoothing,
        constraint_batch_size=train.constraint_batch_size,
        max_new_tokens=train.max_new_tokens,
        temperature=train.temperature,
        length_norm=train.length_norm,
        average_fraction=train.average_fraction,
        max_step_norm=train.max_grad_norm,
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
        gradient_checkpointing=train.gradient_checkpointing,
        bf16=train.autocast,
        use_cpu=train.device == "cpu",
        dataloader_pin_memory=not on_cpu,
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _tensorboard(config: RunConfig, folder: Path) -> list[Any]:
    if not config.logging.tensorboard:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))]


def _evaluator(
    config: RunConfig, tokenizer: Any, held_out: Encoded, constraints: list[Any], console: Console
) -> Callable[[Any, str], tuple[dict[str, Any], list[int]]]:
    """`sample(model, name) -> (summary, lengths)` on the held-out prompts."""

    def sample(model: Any, name: str) -> tuple[dict[str, Any], list[int]]:
        with console.status(f"sampling {config.evaluate.samples} responses: {name}"):
            summary = evaluate(
                model,
                tokenizer,
                [row["prompt"] for row in held_out.rows],
                held_out.rows,
                samples=config.evaluate.samples,
                max_new_tokens=config.train.max_new_tokens,
                batch_size=config.evaluate.batch_size,
                seed=config.seed,
            )
        return summary, []

    return sample


def _report(config: RunConfig, trainer: L3MTrainer, bounds: list[dict[str, Any]], start: float) -> dict[str, Any]:
    """What the run was and how it went, without the models' summaries."""
    logs = [row for row in trainer.state.log_history if "l3m/mu" in row]
    length = next((item for item in bounds if item["name"] == "length"), {})
    iterations = trainer.state.global_step
    return {
        "seed": config.seed,
        "seconds": round(time.monotonic() - start, 1),
        "iterations": iterations,
        "solver": config.train.solver,
        "bounds": {"min": length.get("min"), "max": length.get("max")},
        "constraints": bounds,
        "skipped_steps": logs[-1].get("l3m/skipped_steps", 0) if logs else 0,
        "mu_end": logs[-1]["l3m/mu"] if logs else None,
        "average_from": iterations - max(1, round(config.train.average_fraction * iterations)) + 1,
    }
