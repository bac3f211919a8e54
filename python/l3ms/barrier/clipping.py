"""The clipped update of a half-step: S g' clipped by min(1, max_norm / ||S g'||), without ever forming S g'.

That is one factor on the gradients, min(S, max_norm / ||g'||), and one decision, whether to step at all. torch's fused optimizers take
both as tensors: they divide a gradient by `grad_scale` as they read it (and store it divided), and leave everything alone where
`found_inf` is 1. The gradients are then read once for their norm and once for the update, and the host waits for nothing. Every other
optimizer needs the gradients multiplied before it, where the factor is not 1, and a host that knows the decision: one wait on a GPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3ms.model.sharding import is_part, local, whole


class Clip(NamedTuple):
    """All () on one device."""

    norm: Tensor  # float64, of all gradients, GradScaler's scale taken out
    factor: Tensor  # float64, what the gradients are multiplied by
    finite: Tensor  # bool, whether the norm is


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def clip(
    grads: list[Tensor], total: Tensor, max_norm: float | None, scale: Tensor | None, share: Tensor | None = None
) -> Clip:
    """`total` () float64 is S, `scale` what GradScaler multiplied the loss by, `share` () float64 of the clipped step is what is taken."""
    norm, factor = _norm(grads, total), total
    if scale is not None:
        scale = scale.to(norm)
        norm = norm / scale
    if max_norm is not None:
        factor = torch.minimum(total, max_norm / norm)
    if share is not None:
        factor = factor * share
    if scale is not None:
        factor = factor / scale
    # Gradients of up to 32 bits are multiplied in float32, where neither the factor nor its inverse must be 0 or infinite: a gradient
    # so small moves a little less than S says, one so large is not finite.
    narrow = any(grad.dtype != torch.float64 for grad in grads)
    largest = 1.0 / torch.finfo(torch.float32 if narrow else torch.float64).tiny
    return Clip(norm, factor.clamp(max=largest), norm.isfinite() & (factor > 1.0 / largest))


def apply(base: torch.optim.Optimizer, grads: list[Tensor], factor: Tensor, idle: Tensor) -> None:
    """Step `base` on the gradients times `factor` () float64, or leave it as it is where `idle` () bool."""
    parts: list[torch.optim.Optimizer] = getattr(base, "parts", [base])
    if not all(_folds(part, grads) for part in parts):
        still, by = torch.stack([idle.double(), factor]).tolist()
        if not still:
            if by != 1.0:
                torch._foreach_mul_([local(grad) for grad in grads], by)  # pyright: ignore[reportPrivateImportUsage]
            base.step()
        return
    scale = None if _is_one(factor) else (1.0 / factor).float()
    for part in parts:
        _start_momentum(part)
        fused: Any = part
        fused.found_inf, fused.grad_scale = idle.float(), scale
        try:
            part.step()
        finally:
            del fused.grad_scale, fused.found_inf


def _folds(base: torch.optim.Optimizer, grads: list[Tensor]) -> bool:
    """Whether `base` is one of torch's fused optimizers, on gradients for which a `grad_scale` in float32 is exact enough."""
    known = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)  # a subclass may step otherwise
    groups = base.param_groups
    return (
        type(base) in known
        and all(group["fused"] for group in groups)
        and not any(group.get("dampening") for group in groups)  # see _start_momentum
        and not any(grad.dtype == torch.float64 for grad in grads)
    )


def _is_one(factor: Tensor) -> bool:
    """Asked only where the answer is at hand. It saves storing the gradients, a tenth of a step of SGD on a CPU (`bench/bench_step.py`)."""
    return factor.device.type == "cpu" and factor.item() == 1.0


def _start_momentum(base: torch.optim.Optimizer) -> None:
    """A first step of SGD that is not taken would leave its momentum uninitialised (torch 2.13). From 0 it starts the same, undampened."""
    for group in base.param_groups:
        if group.get("momentum"):
            for p in group["params"]:
                if p.grad is not None and base.state[p].get("momentum_buffer") is None:
                    base.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)


def _norm(grads: list[Tensor], like: Tensor) -> Tensor:
    """The 2-norm of all gradients, as `like`; 0 where there are none."""
    if not grads:
        return torch.zeros_like(like)
    alike: dict[Any, list[Tensor]] = {}  # torch takes no norm of DTensors of several meshes, or with other tensors
    for grad in grads:
        part: Any = grad
        mesh = (part.device_mesh, part.placements) if is_part(grad) else None
        alike.setdefault((mesh, grad.dtype.itemsize == 2, grad.device), []).append(grad)
    norms = [_total_norm(part).to(like) for part in alike.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _total_norm(grads: list[Tensor]) -> Tensor:
    """() of tensors that are alike. Of 16 bits in fp32: in fp16 a norm above 65504 is infinite, and GradScaler alone scales by 65536."""
    if grads[0].dtype.itemsize != 2:
        return whole(torch.nn.utils.get_total_norm(grads))
    if is_part(grads[0]):
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    else:
        norms = [*torch._foreach_norm(grads, 2, dtype=torch.float32)]  # pyright: ignore[reportPrivateImportUsage]
    return whole(torch.linalg.vector_norm(torch.stack(norms)))
