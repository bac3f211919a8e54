"""Transforms of torch.func around the ops: vmap makes one call after the other, derivatives are backward's only.

`torch.library` has no derivative in forward mode: torch would go on with a tangent of 0. What `torch.func.grad` misses it refuses without a
name.
"""

import torch
import torch._C._functorch as _functorch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

_WAY_OUT = "l3m_kernels.reference has the same in plain torch, which is differentiated every way"


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """For the arguments of `op`.

    Raises:
        RuntimeError: one of them has a tangent (`torch.func.jvp`, `jacfwd`, `torch.autograd.forward_ad`), or is differentiated by
            `torch.func.grad`, `vjp`, `jacrev`.
    """
    compiling = torch.compiler.is_compiling()  # where the stack is not there to be seen, tangents are
    kinds = {} if compiling else {each.level(): each.key() for each in _functorch.get_interpreter_stack() or ()}
    for tensor in tensors:
        if tensor is None:
            continue
        while kinds and _functorch.is_functorch_wrapped_tensor(tensor):
            kind = kinds.get(_functorch.maybe_get_level(tensor))
            if kind == _functorch.TransformType.Jvp and _has_tangent(tensor, kinds):
                raise RuntimeError(f"{op}: has no derivative in forward mode (jvp, jacfwd); {_WAY_OUT}")
            if kind == _functorch.TransformType.Grad and tensor.requires_grad:
                raise RuntimeError(f"{op}: cannot be differentiated by torch.func (grad, vjp, jacrev); {_WAY_OUT}")
            tensor = _functorch.get_unwrapped(tensor)
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{op}: has no derivative in forward mode (jvp, jacfwd); {_WAY_OUT}")


@_disable_dynamo  # which looks into what a frame calls that it has left to run as it is
def _has_tangent(tensor: Tensor, kinds: dict[int, _functorch.TransformType]) -> bool:
    """Whether a tensor that `jvp` has wrapped, as it does with constants made inside it too. True where another derivative hides it."""
    level = _functorch.maybe_get_level(tensor)
    inner = (kind for at, kind in kinds.items() if at > level)
    if any(kind != _functorch.TransformType.Vmap for kind in inner):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def wants_gradient(tensor: Tensor | None) -> bool:
    """`requires_grad`, also of what `torch.vmap` has wrapped and says False of."""
    if tensor is None or tensor.requires_grad or torch.compiler.is_compiling():
        return tensor is not None and tensor.requires_grad
    return _functorch.is_functorch_wrapped_tensor(tensor) and wants_gradient(_functorch.get_unwrapped(tensor))


def is_batched(tensor: Tensor) -> bool:
    """Whether it is several tensors at once (`is_grads_batched`, `vmap`), whose values cannot be looked at."""
    return _functorch.is_legacy_batchedtensor(tensor) or _functorch.is_functorch_wrapped_tensor(tensor)
