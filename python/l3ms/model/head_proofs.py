"""The proof that a fused head is the model's own, on the model at hand and through what will be called.

A handful of forwards of three short prompts, without gradients: the logits do not see later tokens, nor padding on the right (what padding
on the left does to sampling is for `rollouts.ways`); log-likelihoods are those of the model's own logits, at their own size and at thirty
times that; what the model adds to its own loss is known. Tolerances are the rounding of the model's own precision, and nothing of the model
is changed.
"""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3ms.model.after_head import AfterHead, Call, logits_of
from l3ms.model.autocasting import wrapped
from l3ms.model.head_output import HeadOutput
from l3ms.model.sharding import computed_in, reshard

_LENGTHS = (8, 5, 3)  # tokens of the prompts
_GAIN = 30.0
_MOST_AMPLIFIED = 1e-3  # what padding does to a model that it reaches is more
_SMALL = 2**20  # elements of buffers that are looked after


def prompt(model: Any, lengths: tuple[int, ...] = (8,), seed: int = 0) -> Tensor:
    """(N, L) ordinary tokens, by turns: none that the configuration names; padded on the right with its padding token."""
    config = model.config.get_text_config()
    rows = min(model.get_input_embeddings().weight.shape[0], getattr(config, "vocab_size", None) or 2**31)
    special = set(_token_ids(model.config.to_dict()))
    ordinary = [token for token in range(min(rows, 4096)) if token not in special] or [0]
    draw = random.Random(seed)
    pad = getattr(config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < rows else ordinary[0]
    ids = [[*draw.choices(ordinary, k=n), *[pad] * (max(lengths) - n)] for n in lengths]
    return torch.tensor(ids, device=_device(model))


def _device(model: Any) -> torch.device:
    """Where it computes, also with weights that accelerate brings there when they are wanted."""
    device = next(model.parameters()).device
    if device.type == "meta":
        for module in model.modules():
            hook = vars(module).get("_hf_hook")
            for one in getattr(hook, "hooks", [hook]):
                device = torch.device(getattr(one, "execution_device", None) or device)
    if device.type == "meta":
        raise ValueError("fuse_head: the model's weights are on the meta device: load them first")
    return device


def _token_ids(config: Any) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif str(key).endswith(("_id", "_index", "_ids")):
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (v for v in values if isinstance(v, int))


def prove(call: Call, model: Any, after: AfterHead) -> None:
    """Raises `ValueError` where the fused head of `model`, called through `call`, is not proven."""
    name = type(model).__name__
    ids = prompt(model, _LENGTHS)
    width = ids.shape[1]
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in _LENGTHS], device=ids.device)
    real = mask.bool()

    def logits(ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        out = logits_of(call(input_ids=ids, attention_mask=mask, use_cache=False, **options))
        return out[:, -ids.shape[1] :].double()  # a prompt that PEFT has trained stands before them

    own = logits(ids, mask)
    eps = _precision(model)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
    noise = eps * depth**0.5 + 1e-6  # relative, of logits that go through other sums
    if not own[real].isfinite().all():
        raise ValueError(f"fuse_head: {name} has logits that are not finite on ordinary tokens; it cannot be used")

    alone = [
        _difference(logits(ids[row : row + 1, :n]), own[row : row + 1, :n])
        for row, n in enumerate(_LENGTHS)
        if n < width
    ]
    # Real models amplify rounding: SmolLM2-135M in float32 that of its embeddings thirty times.
    with _rounded_embeddings(model, eps):
        amplified = depth**0.5 * _difference(logits(ids, mask)[real], own[real])
    if not all(difference <= 8 * max(noise, min(amplified, _MOST_AMPLIFIED)) for difference in alone):
        raise ValueError(
            f"fuse_head: {name} gives other logits with padding on the right than without; it cannot be used"
        )
    # Sums of the same shapes: the same bits, but for experts, whose rows are others then.
    later = real & (torch.arange(width, device=ids.device) >= (mask.sum(1, keepdim=True) + 1) // 2)
    changed = torch.where(later, prompt(model, _LENGTHS, seed=1), ids)
    earlier = real & ~later
    if not _difference(logits(changed, mask)[earlier], own[earlier]) <= max(4 * max(alone), noise / 8):
        raise ValueError(f"fuse_head: {name} is not causal: its logits depend on later tokens; it cannot be used")

    labels = torch.randint(after.columns, ids.shape, generator=torch.Generator().manual_seed(0)).to(ids.device)
    labels = labels.masked_fill(~real, -100)
    labels[:, 0] = -100  # a learned prefix would predict it
    nothing = torch.zeros(len(ids), device=ids.device, dtype=torch.float32)
    options = {"attention_mask": mask, "labels": labels, "use_cache": False}

    def compare(own: Tensor) -> HeadOutput:
        out = call(input_ids=ids, seq_weight=nothing, **options)
        if not isinstance(out, HeadOutput) or out.token is None:
            raise unreached(name, _own_forward(call, model))
        if out.loss is None or float(out.loss) != 0:
            raise ValueError(f"fuse_head: {_kind(call)} adds to the loss of {name}, which cannot be told apart")
        scored = real[:, 1:]
        theirs = own[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        bound = _rounding(eps) * own[:, :-1].abs().amax(-1) + 1e-6
        ours = out.token[:, -width:-1].to(theirs)
        wrong = scored & ~((ours - theirs).abs() <= bound)
        if wrong.any():
            raise ValueError(
                f"fuse_head: {name} changes its logits in a way that the fused head does not know (log-likelihoods "
                f"{_first(theirs, wrong):.4g} against {_first(ours, wrong):.4g}); it cannot be used"
            )
        return out

    fused = compare(own)
    with _larger_logits(model):
        compare(logits(ids, mask))
    _prove_loss(call, ids, options, own, fused.auxiliary, eps, name)


def _prove_loss(
    call: Call, ids: Tensor, options: dict[str, Any], own: Tensor, auxiliary: Tensor | None, eps: float, name: str
) -> None:
    """The model's own loss is a mean cross-entropy, of shifted labels or not, and what was found beside it."""
    try:
        out = call(input_ids=ids, **options)
        theirs = out.loss if hasattr(out, "loss") else out[0]
    except Exception:  # no loss of its own for such labels
        return
    if not isinstance(theirs, Tensor) or theirs.ndim:
        return
    labels, token = options["labels"], own.log_softmax(-1)
    aligned = F.cross_entropy(token.flatten(0, 1), labels.flatten())
    shifted = F.cross_entropy(token[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    bound = _rounding(eps) * float(own.abs().max()) + 1e-5
    added = 0.0 if auxiliary is None else float(auxiliary)
    if min(abs(float(theirs) - float(ours) - added) for ours in (aligned, shifted)) > bound + _rounding(eps) * abs(
        added
    ):
        raise ValueError(
            f"fuse_head: {name} changes its logits in a way that the fused head does not know, or its loss: that is "
            f"{float(theirs):.4g}, the cross-entropy of its logits {float(shifted):.4g}; it cannot be used (a loss function "
            "that was set, a term that its configuration adds to the loss?)"
        )


def _rounding(eps: float) -> float:
    """Of logits, relative to the largest: a product in that precision, a cap and a scale."""
    return 4 * eps + 1e-5


def _precision(model: nn.Module) -> float:
    """eps of the coarsest numbers that the model computes with."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} | computed_in(model)
    eps = max((torch.finfo(kind).eps for kind in kinds if kind.itemsize > 1), default=2.0**-7)
    if any(kind.itemsize == 1 for kind in kinds):
        eps = max(eps, 2.0**-7)
    if next(model.parameters()).is_cuda and torch.float32 in kinds:
        eps = max(eps, 2.0**-10 if torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32 else 0.0)
    return eps


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, in that of the logits about their mean; nan where they are not finite."""
    size = (theirs - theirs.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((ours - theirs).square().mean().sqrt() / (size + 1e-12))


def _first(values: Tensor, where: Tensor) -> float:
    return float(values[where][0])


def _kind(call: Any) -> str:
    return type(getattr(call, "base_model", call)).__name__


def unreached(name: str, why: str) -> ValueError:
    return ValueError(
        f"fuse_head: a call does not reach the head of {name}: {why}; call fuse_head first, and wrap the forward after it"
    )


def _own_forward(call: Any, model: Any) -> str:
    """Who keeps a forward from before."""
    for module in (*call.modules(), model):
        if "forward" in vars(module) and (module is model or any(child is model for child in module.children())):
            return f"{type(module).__name__} has a forward of its own"
    return f"{type(call).__name__} does not pass it on"


@contextmanager
def _larger_logits(model: Any) -> Iterator[None]:
    """Logits are thirty times as large inside the block: the head is given so much more."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0] * _GAIN, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rounded_embeddings(model: Any, eps: float) -> Iterator[None]:
    """Each number of an embedding is one in its last place larger or smaller inside the block."""

    def moved(_: Any, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        signs = torch.randint(2, out.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return out * (1 + eps * signs.to(out))

    handle = model.get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation, without gradients and outside of any autocast, in whose 16 bits nothing could be told apart; after the block modes,
    attributes, buffers and random states are as they were before it."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    values = [
        (b, b.clone()) for _, _, buffers in modules for b in buffers.values() if b is not None and b.numel() <= _SMALL
    ]
    device = "cuda" if devices else next((p.device.type for p in model.parameters() if not p.is_meta), "cpu")
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module, _, _ in modules:
                module.training = False
                if wrapped(module):
                    vars(module)["forward"] = vars(module)["_original_forward"]
            with torch.autocast(device, enabled=False):
                yield
    finally:
        for module, attributes, buffers in modules:
            for name in vars(module).keys() - attributes.keys():
                if not name.startswith("_l3m_"):
                    del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)
        reshard(model)
