"""`train.optimizer`: the names that are taken, and which options of the configuration each has a use for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

# torch's own, which take `train.optimizer_options`. Of `betas` Adam has both, Muon the first as its momentum.
TORCH = ("adamw_fused", "adamw", "muon", "sgd", "rmsprop", "adagrad")
# transformers' names of what other packages have (torchao, bitsandbytes, schedulefree ...); it says which one is missing.
OTHERS = (
    *("adafactor", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *(
        "ademamix",
        "ademamix_8bit",
        "paged_ademamix_8bit",
        "paged_ademamix_32bit",
        "lion_8bit",
        "lion_32bit",
        "paged_lion_8bit",
    ),
    *("paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "grokadamw", "stable_adamw"),
    *("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"),
)
WITHOUT_BETAS = (
    "sgd",
    "rmsprop",
    "adagrad",
    "adafactor",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "schedule_free_sgd",
    "grokadamw",  # transformers hands it none
)
# Options that have a field of their own in `train`.
ELSEWHERE = {
    "lr": "learning_rate",
    "betas": "betas",
    "weight_decay": "weight_decay",
    "params": "lora",
    "fused": "optimizer",
}


def wrong_optimizer(name: str, options: Mapping[str, Any], betas_given: bool) -> tuple[str, str] | None:
    """(field of `train`, what is wrong with it), None where nothing is."""
    if name not in TORCH + OTHERS:
        if name.startswith(("galore", "apollo")):
            return "optimizer", f"{name!r} needs to be told of which modules: give L3MConfig optim_target_modules"
        if name.startswith("adamw_torch_") and name.endswith("bit"):
            return (
                "optimizer",
                f"{name!r} has its state in tensors of torchao's, which no checkpoint here can hold; use adamw_8bit",
            )
        if name.endswith("lomo") or name.endswith("_layerwise"):
            return "optimizer", f"{name!r} steps while gradients are made: the two half-steps cannot be told apart"
        near = difflib.get_close_matches(name.lower().replace("-", "_"), TORCH + OTHERS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(TORCH + OTHERS)}"
        return "optimizer", f"unknown optimizer {name!r}; {hint}"
    if betas_given and name in WITHOUT_BETAS:
        return "betas", f"are not used by optimizer {name}"
    if options and name not in TORCH:
        return "optimizer_options", f"are taken of torch's own ({', '.join(TORCH)}), and not of {name}"
    for option in options:
        if option in ELSEWHERE:
            return "optimizer_options", f"{option!r} has a field of its own: train.{ELSEWHERE[option]}"
    return None
