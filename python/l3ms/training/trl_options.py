"""What of a trainer's own options `constrained(TrainerClass)` takes: each does what it says, or is refused here, in one line.

The task stays what the trainer makes of it. Refused is what would make the constraints' gradient another than that of the mean of their
rewards: samples that are not the policy's, or tokens and responses that the trainer leaves out of its loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from l3ms.constraints.constraint import Constraint
from l3ms.training.arguments import L3MConfig
from l3ms.training.settings import L3MSettings

SAMPLED_BY_OURS = (
    *("constraint_batch_size", "max_new_tokens", "temperature", "rollout_every", "rollout_reuse", "rollout_importance"),
)
PLAIN_SAMPLING = {"top_p": (1.0, None), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
WHOLE_LOSS: dict[str, tuple[Any, str]] = {  # the value that leaves nothing out, and what another one does
    "mask_truncated_completions": (False, "responses that were cut"),
    "top_entropy_quantile": (1.0, "tokens of low entropy"),
    "off_policy_mask_threshold": (None, "responses far from the policy that sampled them"),
}
TURNS = ("tools", "environment_factory")


def check_settings(l3m: Any, where: str) -> None:
    if isinstance(l3m, L3MConfig) or not isinstance(l3m, L3MSettings):
        raise ValueError(
            f"l3m must be an l3ms.L3MSettings, got {type(l3m).__name__}: the arguments of {where} are args"
        )


def check_arguments_of(where: str, args: Any) -> None:
    if isinstance(args, L3MConfig):
        raise ValueError(
            f"args: an L3MConfig is for L3MTrainer; give {where} its own arguments, and l3m=L3MSettings(...)"
        )


def check_own_samples(where: str, l3m: L3MSettings, given: Mapping[str, Any], prompts: Any) -> None:
    """Of a trainer that samples by itself, before it is made: its arguments `given`."""
    if prompts is not None:
        raise ValueError(f"prompts: {where} samples responses to its train_dataset, which are weighed; leave them out")
    default = {item.name: item.default for item in fields(L3MSettings)}
    for name in SAMPLED_BY_OURS:
        if getattr(l3m, name) != default[name]:
            raise ValueError(
                f"l3m.{name} is of responses that are sampled for the constraints, and {where} weighs its own: leave it out, and "
                f"see {type(given.get('args')).__name__ if given.get('args') is not None else 'its config'}"
            )
    if l3m.length_norm != default["length_norm"]:
        raise ValueError(
            f"l3m.length_norm: what divides a response's weight in {where} is its loss type's; leave it out, got {l3m.length_norm!r}"
        )
    if l3m.half_steps == "alternating":
        raise ValueError(
            f"l3m.half_steps: {where} takes one step on task and constraints, whose samples are the same; leave it out"
        )
    for name in TURNS:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} is not taken: what tools say stands in the completions and is not the policy's, but rewards and lengths count it"
            )


def check_sampling_of(args: Any) -> None:
    """The arguments of a trainer that samples by itself, as it has completed them."""
    for name, plain in PLAIN_SAMPLING.items():
        value = getattr(args, name, None)
        if value not in plain:
            raise ValueError(
                f"{name} must be {plain[0]}: the gradient is of the model's own distribution, and so must samples be, got {value}"
            )
    if args.generation_kwargs:
        raise ValueError(
            f"generation_kwargs must be empty: samples must be the model's own distribution's, got {args.generation_kwargs}"
        )
    for name, (whole, what) in WHOLE_LOSS.items():
        value = getattr(args, name, whole)
        if value != whole:
            raise ValueError(
                f"{name} must be {whole}: it leaves {what} out of the loss, and so out of the constraints' gradient, got {value}"
            )
    every, accumulated = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    if every % accumulated and accumulated % every:
        raise ValueError(
            f"steps_per_generation * num_iterations = {every} must divide gradient_accumulation_steps = {accumulated} or be a multiple of "
            "it: an optimizer step of new and used samples has no one S"
        )


def check_tokenizer(given: Any) -> None:
    """Of a trainer whose responses are looked at."""
    if not isinstance(given, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class: constraints on responses need the model's tokenizer, and take no images, got {type(given).__name__}"
        )


def prompt_rows(where: str, prompts: Any, rows: Any, constraints: Sequence[Constraint]) -> Any:
    """Rows with prompts to be answered, from `prompts` or else the training rows; None where no constraint samples.

    Raises:
        ValueError: rows that cannot be looked up, or that have no prompt.
    """
    name = next((constraint.name for constraint in constraints if constraint.samples), None)
    if name is None:
        return None
    argument, given = ("train_dataset", rows) if prompts is None else ("prompts", prompts)
    if not hasattr(given, "__len__") or not hasattr(given, "__getitem__") or not len(given):
        kind = type(given).__name__ if not hasattr(given, "__len__") else "none"
        raise ValueError(
            f"{argument}: constraint {name!r} samples responses to prompts in random order, got {kind}; give a list as prompts="
        )
    if prompts is not None and not isinstance(given[0], Mapping):
        given = [{"prompt": prompt} for prompt in given]
    if "prompt" not in given[0]:
        raise ValueError(
            f"{argument}: constraint {name!r} samples responses to prompts, and {where}'s rows have no 'prompt', only {sorted(given[0])}; "
            'give prompts=[{"prompt": ...}, ...]'
        )
    return given
