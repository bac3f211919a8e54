"""Ways to differentiate a function of a tensor, and to call it several times: what torch has of them, each with a tensor as its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

Function = Callable[[Tensor], Tensor]


def _tracked(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def _dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent
        return x.new_zeros(()) if tangent is None else tangent.clone()


def _dual_of_leaf(f: Function, x: Tensor) -> Tensor:
    return _dual(f, _tracked(x)).detach()


def _grads_batched(f: Function, x: Tensor) -> Tensor:
    x = _tracked(x)
    upstream = torch.tensor([1.0, -2.5, 0.0], dtype=torch.float64)
    return torch.autograd.grad(f(x), x, upstream, is_grads_batched=True)[0]


def _vmap_then_backward(f: Function, x: Tensor) -> Tensor:
    x = _tracked(x)
    return torch.autograd.grad(torch.vmap(f)(_several(x)).square().sum(), x)[0]


def _in_a_module(f: Function, x: Tensor) -> nn.Module:
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = nn.Parameter(torch.zeros_like(x))

        def forward(self):
            return f(self.held)

    return Holder()


def _functional_call(f: Function, x: Tensor) -> Tensor:
    x = _tracked(x)
    return torch.autograd.grad(torch.func.functional_call(_in_a_module(f, x), {"held": x}, ()), x)[0]


def _grad_of_functional_call(f: Function, x: Tensor) -> Tensor:
    module = _in_a_module(f, x)
    return torch.func.grad(lambda held: torch.func.functional_call(module, {"held": held}, ()))(x)


def _second(f: Function, x: Tensor) -> Tensor:
    x = _tracked(x)
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def _second_backward(f: Function, x: Tensor) -> Tensor:
    x = _tracked(x)
    (gradient,) = torch.autograd.grad(3 * f(x.tanh()), x, create_graph=True)
    gradient.square().sum().backward()
    return x.new_zeros(()) if x.grad is None else x.grad


def _of_the_scale(f: Function, x: Tensor) -> Tensor:
    x, scale = _tracked(x), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale * f(x), x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), scale)[0]


def _checkpointed(f: Function, x: Tensor) -> Tensor:
    x = _tracked(x)
    return torch.autograd.grad(checkpoint(lambda x: f(x.sin()), x, use_reentrant=False), x)[0]


def _several(x: Tensor) -> Tensor:
    return torch.stack([x, -x, 0.5 * x])


TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "func.grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(x),
    "func.vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(1.5, dtype=torch.float64))[0],
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "func.jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1],
    "func.linearize": lambda f, x: torch.func.linearize(f, x)[1](x.cos()),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(_several(x)),
    "vmap in chunks": lambda f, x: torch.vmap(f, chunk_size=2)(_several(x)),
    "vmap of vmap": lambda f, x: torch.vmap(torch.vmap(f))(torch.stack([_several(x), _several(x.sin())])),
    "vmap, then backward": _vmap_then_backward,
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(_several(x)),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(_several(x)).sum())(x),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.vmap(f), (_several(x),), (_several(x.cos()),))[1],
    "dual numbers": _dual,
    "dual numbers of a leaf": _dual_of_leaf,
    "is_grads_batched": _grads_batched,
    "functional_call": _functional_call,
    "func.grad of functional_call": _grad_of_functional_call,
    "jacobian": lambda f, x: functional.jacobian(f, x),
    "jacobian, vectorized": lambda f, x: functional.jacobian(f, x, vectorize=True),
    "jacobian, forward": lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "hessian": lambda f, x: functional.hessian(f, x),
    "hessian, vectorized": lambda f, x: functional.hessian(f, x, vectorize=True),
    "hvp": lambda f, x: functional.hvp(f, x, x.cos())[1],
    "vhp": lambda f, x: functional.vhp(f, x, x.cos())[1],
    "jvp by double backward": lambda f, x: functional.jvp(f, x, x.cos())[1],
    "second derivative": _second,
    "second derivative by backward": _second_backward,
    "derivative in the scale": _of_the_scale,
    "checkpoint": _checkpointed,
}
