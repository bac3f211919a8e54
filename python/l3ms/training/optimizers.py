"""The optimizers that a configuration names, as transformers' Trainer takes them.

Muon (Jordan 2024, torch.optim.Muon) orthogonalises the update of a matrix; embeddings, head, biases and norms are AdamW's. Its rate is
matched to AdamW's update (`match_rms_adamw`, arXiv 2502.16982), so that one `learning_rate` is right for both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l3ms.barrier.several import SeveralOptimizers

_TORCH: dict[str, type[torch.optim.Optimizer]] = {
    "adamw_fused": torch.optim.AdamW,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


def torch_optimizer(
    name: str, options: Mapping[str, Any], *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> tuple[Any, dict[str, Any]]:
    """`name`, one of `l3ms.config.optimizers.TORCH` -> `optimizer_cls_and_kwargs` of the Trainer.

    Raises:
        ValueError: an option that the optimizer does not have, or a value that is none of it, or a torch that is too old for Muon; it
            begins with the field.
    """
    kind: Any = getattr(torch.optim, "Muon", None) if name == "muon" else _TORCH[name]
    if kind is None:
        raise ValueError(f"optimizer muon needs torch >= 2.9, this is {torch.__version__}")
    parameters = inspect.signature(kind.__init__).parameters
    known = {option: item.annotation for option, item in parameters.items() if option not in ("self", "params")}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"optimizer_options: {name} has no {option!r}; it has {', '.join(known)}")
        if not _is_one(value, known[option]):
            wanted = getattr(known[option], "__name__", known[option])
            raise ValueError(f"optimizer_options: {option} of {name} must be {wanted}, got {value!r}")
    if name == "muon":
        own = {"momentum": betas[0], "adjust_lr_fn": "match_rms_adamw", **options}
        return MuonAndAdamW, {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "muon": own}
    settings: dict[str, Any] = {"betas": betas} if kind is torch.optim.AdamW else {}
    if name == "adamw_fused":
        settings["fused"] = True
    return kind, {"lr": learning_rate, **settings, **options}


def _is_one(value: Any, annotation: Any) -> bool:
    """Whether a number, text, truth value or None is what an argument is annotated as: torch takes any text for true."""
    kinds = str(annotation)
    if annotation is inspect.Parameter.empty:
        return True
    if value is None:
        return "None" in kinds or "Optional" in kinds
    kind = type(value).__name__
    return kind in kinds or (kind == "int" and "float" in kinds)


def try_step(optimizer: tuple[Any, dict[str, Any]], device: torch.device) -> None:
    """One step of weights that are thrown away, by what `torch_optimizer` gave; no random number is drawn.

    Raises:
        ValueError: what the optimizer says against its options; it begins with the field.
    """
    kind, settings = optimizer
    layer = nn.Module()
    layer.weight, layer.bias = (nn.Parameter(torch.ones(shape, device=device)) for shape in ((2, 2), (2,)))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    try:
        made = kind()(layer, **settings) if kind is MuonAndAdamW else kind(layer.parameters(), **settings)
        made.step()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # TypeError, RuntimeError, AssertionError ...
        raise ValueError(f"optimizer_options: {' '.join(str(error).split()) or type(error).__name__}") from error


class MuonAndAdamW:
    """A factory of the Trainer's: called with the model and its options, it makes one optimizer of two."""

    def __call__(
        self, model: nn.Module, *, lr: float, betas: tuple[float, float], muon: Mapping[str, Any], weight_decay: float
    ) -> torch.optim.Optimizer:
        """Raises ValueError where the model trains no matrix."""
        tables = [
            get()
            for get in (getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None))
            if get
        ]
        theirs = {id(p) for table in tables if table is not None for p in table.parameters()}
        theirs |= {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in theirs]
        if not matrices:
            raise ValueError("optimizer muon: no matrix of a hidden layer is trained; use adamw")
        chosen = {id(p) for p in matrices}
        rest = [p for p in trained if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **muon)]
        if rest:
            parts.append(torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas))
        return SeveralOptimizers(parts)
