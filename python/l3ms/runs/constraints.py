"""The constraints of a configuration, with all that they load: code, reward models, data, the reference of a divergence."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from l3ms.config.constraints import DataNLLConfig, FunctionConfig, KLConfig, ReadyRewardConfig, RewardModelConfig
from l3ms.config.errors import blame
from l3ms.config.run_config import RunConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints import rewards
from l3ms.constraints.constraint import Constraint, Length
from l3ms.constraints.data_nll import DataNLL
from l3ms.constraints.divergence import KL
from l3ms.constraints.reward_model import RewardModel
from l3ms.constraints.trl_arguments import trl_arguments
from l3ms.ranks.group import world
from l3ms.runs.data import IGNORE_INDEX, encode, load_examples, overlap
from l3ms.runs.models import context_of
from l3ms.runs.terminal import say
from l3ms.runs.user_rewards import load_reward, try_reward

OFTEN = 4  # times through the rows of a data constraint


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
        name: getattr(item, name, None)
        for name in ("min", "max", "scale", "margin", "threshold", "quantile", "monitor")
    }
    if isinstance(item, FunctionConfig):
        function, source = load_reward(f"{field}.function", item.function)
        say(console, f"Running code for constraint {item.name}: {source}")
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
        del options["threshold"], options["quantile"]
        train, held_out = _constraint_rows(config, field, item, tokenizer, model, console)
        pad = tokenizer.pad_token_id or 0
        if passes := _often_seen(config, item, len(train)):
            say(
                console,
                f"{field}: {config.train.iterations} half-steps of {item.batch_size} go {passes:.0f} times through its {len(train)} rows, "
                "which may be learnt by heart: its estimate then says little of others; more rows, or fewer in a half-step",
            )
        measured_from = _reference(config, item) if item.relative else {}
        constraint = DataNLL(
            item.name, train, held_out=held_out, batch_size=item.batch_size, pad_token_id=pad, relative=item.relative,
            **measured_from, **options,
        )  # fmt: skip
        constraint.prepare(model)
        return constraint
    if isinstance(item, KLConfig):
        constraint = KL(
            name=item.name, per_token=item.per_token, batch_size=item.batch_size, **_reference(config, item), **options
        )
        constraint.prepare(model)
        return constraint
    return Length(name=item.name, **options)


def _often_seen(config: RunConfig, item: DataNLLConfig, rows: int) -> float:
    """How often a run trains on each row of a constraint, where that is often; else 0."""
    passes = config.train.iterations * item.batch_size * world() / rows
    return passes if passes > OFTEN and not item.monitor and config.train.solver != "none" else 0.0


def _reference(config: RunConfig, item: DataNLLConfig | KLConfig) -> dict[str, Any]:
    """The model that a constraint measures from. The code that was announced is the model's: a reference of its own brings none."""
    reference = item.reference or config.model
    return {"reference": reference, "trust_remote_code": config.trust_remote_code and reference == config.model}


def _constraint_rows(
    config: RunConfig, field: str, item: DataNLLConfig, tokenizer: Any, model: Any, console: Console
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Token rows of both sides of a data constraint: those of the half-steps, and those that are held out."""
    try:
        sides = load_examples(item.data, seed=config.seed)
        limit = min(item.data.max_length, context_of(model))
        options = {"max_length": limit, "chat_template": item.data.chat_template}
        fields = ("data.train", "data.evaluation")
        encoded = [encode(side, tokenizer, name=name, **options) for name, side in zip(fields, sides, strict=True)]
    except ConfigError as error:  # names data.train, data.evaluation
        if not error.field.startswith("data."):  # the model
            raise
        raise ConfigError(f"{field}.{error.field}", error.message) from error
    for note in overlap(*sides):
        say(console, f"{field}.data.evaluation: {note}")
    for name, side in zip(fields, encoded, strict=True):
        for note in side.notes(f"{field}.{name}"):
            say(console, note)
        if not side.rows:
            raise ConfigError(f"{field}.{name}", side.nothing(limit - 1))
    return encoded[0].rows, encoded[1].rows


def try_rewards(
    config: RunConfig,
    constraints: list[Constraint],
    tokenizer: Any,
    rows: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
) -> None:
    """Each reward function gets the first reference answers, as it will get the sampled ones. Functions of the user's own get those of the
    held-out rows too, where these may have other columns: they would fail after the training."""
    _try(
        config,
        constraints,
        tokenizer,
        rows,
        {FunctionConfig: "function", RewardModelConfig: "model", ReadyRewardConfig: "reward"},
    )
    named = next((name for name in ("evaluation", "evaluation_split") if getattr(config.data, name) is not None), None)
    if named is not None or held_out[0].keys() != rows[0].keys():
        try:
            _try(config, constraints, tokenizer, held_out, {FunctionConfig: "function"})
        except ConfigError as error:
            raise ConfigError(
                f"data.{named or 'train'}", f"with the held-out rows {error.field} {error.message}"
            ) from error


def _try(
    config: RunConfig,
    constraints: list[Constraint],
    tokenizer: Any,
    rows: list[dict[str, Any]],
    blamed: dict[type, str],
) -> None:
    prompts = [row["prompt"] for row in rows]
    answers = [[token for token in row["labels"] if token != IGNORE_INDEX] for row in rows]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = {name: [row[name] for row in rows] for name in set(rows[0]) - {"input_ids", "labels", "prompt"}}
    columns |= trl_arguments(iterations=config.train.iterations)
    columns["completion_ids"] = answers
    columns["raw_completions"] = [tokenizer.decode(tokens) for tokens in answers]
    columns["ended"] = [tokens[-1] == tokenizer.eos_token_id for tokens in answers]
    for index, (item, constraint) in enumerate(zip(config.constraints, constraints, strict=True)):
        if type(item) in blamed:
            field, nonfinite = f"constraints.{index}.{blamed[type(item)]}", config.train.nonfinite
            try_reward(field, constraint, prompts, completions, columns, nonfinite=nonfinite)
