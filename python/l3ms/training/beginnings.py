"""What all rows of a batch begin with, through the model once, and with its gradient.

A response attends to the keys and values of its prompt, so what they get of its gradient counts. But where prompts begin alike (a system
turn, an instruction) these are the same numbers in each row: computed once and spread over the rows, they get the sum of what comes back.
Loss and gradient are those of whole rows, up to rounding.

It is done on a CPU, in float32 weights (also with autocast), of one process, where nothing is drawn in the forward. Whether a model's cache
carries the gradient is tried once, on rows of the first batch for which it pays. On a GPU attention that begins behind a cache is another
kernel; nobody has measured what it would gain there.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from l3ms.model.autocasting import outside_autocast
from l3ms.model.inside_adapters import active_adapters, inside_adapters, reads_rows
from l3ms.model.sharding import several_ranks
from l3ms.rollouts.packed_weights import is_large
from l3ms.rollouts.shared_prefix import LEAST, cache_of

TAKEN = {"input_ids", "attention_mask", "labels", "scored", "use_cache"}
EXACT = 1e-3  # of a gradient's norm: float32 rounds by 1e-6 to 1e-5 of it, a cache without its gradient leaves out a good part
TRIED = 2  # rows
LIMITS = ("window", "chunk", "original_max")  # in the names of widths beyond which caches or positions are others

_right: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


def forward(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """`model(**inputs, **options)` of a fused head, (N, L) rows padded on the right; `options` has `seq_weight`. -> its `HeadOutput`."""
    inputs = {**inputs, "use_cache": False}
    count = _count(inputs)
    if count and _could(model, inputs) and _is_right(model, inputs, count, options):
        return _behind(model, inputs, count, options)
    return model(**inputs, **options)


def _count(inputs: dict[str, Any]) -> int:
    """Tokens that all rows begin with and that the head need not see; 0 where they are too few, or rows hold something else too."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if ids.device.type != "cpu" or ids.dim() != 2 or not inputs.keys() <= TAKEN or "attention_mask" not in inputs:
        return 0
    alike = (ids == ids[:1]).all(0) & inputs["attention_mask"].bool().all(0)
    alike[:-1] &= (labels[:, 1:] == -100).all(0)  # what the last of them predicts is not scored
    alike[-1] = False
    count = int(alike.long().cumprod(0).sum())
    return count if (len(ids) - 1) * count >= LEAST else 0


def _could(model: Any, inputs: dict[str, Any]) -> bool:
    inner = inside_adapters(model)
    if not isinstance(inner, PreTrainedModel) or torch.is_inference_mode_enabled() or not is_large(inner):
        return False
    if several_ranks() or reads_rows(model) or any(p.dtype != torch.float32 for p in model.parameters()):
        return False
    return inputs["input_ids"].shape[1] < _limit(inner.config) and not any(map(_changes, model.modules()))


def _changes(module: nn.Module) -> bool:
    """Whether it draws numbers in a training, or computes its part again without a cache."""
    values = vars(module)
    drawn = values.get("p", 0) if isinstance(module, nn.Dropout) else 0
    drawn = drawn or any(value for key, value in values.items() if isinstance(value, float) and _draws(key))
    drawn = drawn or values.get("neftune_noise_alpha")  # whose size is by the length of what comes through
    return bool(values.get("gradient_checkpointing")) or (module.training and bool(drawn))


def _draws(name: str) -> bool:
    return any(word in name for word in ("dropout", "jitter", "drop_path", "layerdrop"))


def _limit(config: Any) -> float:
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    ropes = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one, or one for each kind of layer
    named = [pair for values in (text.to_dict(), *ropes) for pair in values.items()]
    found = [value for name, value in named if any(word in name for word in LIMITS)]
    if any("dynamic" in (values.get("rope_type"), values.get("type")) for values in ropes):
        found.append(getattr(text, "max_position_embeddings", None))
    return min((value for value in found if type(value) is int and value > 0), default=float("inf"))


def _is_right(model: Any, inputs: dict[str, Any], count: int, options: dict[str, Any]) -> bool:
    known = _right.setdefault(model, {})
    attention = getattr(inside_adapters(model).config, "_attn_implementation", None)
    state = str((type(model), model.training, active_adapters(model), attention, options.get("auxiliary")))
    if state not in known:
        known[state] = _tried(model, inputs, count, options)
    return known[state]


def _tried(model: Any, inputs: dict[str, Any], count: int, options: dict[str, Any]) -> bool:
    trained = [p for p in model.parameters() if p.requires_grad]
    watched = [*trained[:4], *trained[4:][-2:]]  # the first get what comes back through all layers
    rows = {name: inputs[name][:TRIED] for name in ("input_ids", "attention_mask", "labels")}
    rows["use_cache"] = False
    given = {**options, "seq_weight": torch.full((len(rows["input_ids"]),), 1.0 / TRIED, dtype=torch.float32)}
    try:
        with torch.enable_grad(), outside_autocast(model):
            whole, found = (
                _gradient(out, watched) for out in (model(**rows, **given), _behind(model, rows, count, given))
            )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of the model's own code: as many kinds as there are models
        return False
    return all(
        bool((a - b).norm() <= EXACT * a.norm()) and bool(a.isfinite().all()) for a, b in zip(whole, found, strict=True)
    )


def _gradient(out: Any, watched: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of tokens, and the gradient of all that is watched."""
    if out.auxiliary is not None:
        raise ValueError("the model adds something of all tokens to its loss")
    parts = torch.autograd.grad(out.loss, watched, allow_unused=True)
    flat = [torch.zeros_like(p) if part is None else part for part, p in zip(parts, watched, strict=True)]
    return out.token.detach(), torch.cat([part.flatten() for part in flat])


def _behind(model: Any, inputs: dict[str, Any], count: int, options: dict[str, Any]) -> Any:
    """The rest of the rows behind what they begin with."""
    cache = cache_of(model, inputs["input_ids"], inputs["attention_mask"], count)
    rest = {name: inputs[name][:, count:] for name in ("input_ids", "labels")}
    out = model(**{**inputs, **rest, "use_cache": True}, past_key_values=cache, **options)
    out.token = F.pad(out.token, (count, 0))
    return out
