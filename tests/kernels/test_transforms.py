"""torch.func and forward mode around the ops: what vmap makes of them is right, what has no derivative is refused by the op's name."""

import math
from collections.abc import Callable

import pytest
import torch
from head_cases import BOTH, WEIGHTED_BACKENDS, Case
from test_ops_autograd import everything_weighted, scalar
from torch import Tensor
from torch.autograd import forward_ad

from l3m_kernels import (
    Bounds,
    barrier_multiplier,
    barrier_weights,
    initial_state,
    parallel,
    relaxed_log_barrier,
    weighted_log_likelihood,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of which torch's forward mode is made

Function = Callable[[Tensor], Tensor]
NAMES = {"log_likelihood": "log_likelihood", "weighted": "weighted_log_likelihood"}
CASES = [*BOTH, ("relaxed_log_barrier", ""), ("barrier_multiplier", ""), ("barrier_weights", "")]
each_op = pytest.mark.parametrize(("op", "backend"), CASES)
each_head = pytest.mark.parametrize(("op", "backend"), BOTH)


def function_of(op: str, backend: str) -> tuple[Function, Tensor]:
    """A number of one tensor, and where."""
    z = torch.tensor([-0.5, 0.1, 0.3], dtype=torch.float64)
    if op == "barrier_weights":
        bounds = Bounds.of([(0, 1.0, 0.3, 1.0, 0.0, 0.0, math.inf)])
        return lambda rewards: barrier_weights(rewards[:, None], initial_state(1), bounds, 0.3).multiplier.sum(), z
    if op not in NAMES:
        barrier = {"relaxed_log_barrier": relaxed_log_barrier, "barrier_multiplier": barrier_multiplier}[op]
        return lambda z: barrier(z, 0.3).sum(), z
    case = Case.plain(dtype=torch.float64 if backend != "triton" else torch.float32)
    inputs = everything_weighted(case.build())
    leaves = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    return lambda hidden: scalar(op, backend, case, inputs, leaves | {"hidden": hidden}), leaves["hidden"]


def dual(f: Function, x: Tensor) -> None:
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))


def several(x: Tensor) -> Tensor:
    return torch.stack([x, -x, 0.5 * x])


@each_op
@pytest.mark.parametrize(
    "transform",
    [
        dual,
        lambda f, x: dual(f, x.clone().requires_grad_()),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.jvp(torch.vmap(f), (several(x),), (several(x),)),
    ],
    ids=["dual", "dual of a leaf", "jvp", "jacfwd", "jvp of vmap"],
)
def test_forward_mode_is_refused_and_not_a_tangent_of_0(op, backend, transform):
    f, x = function_of(op, backend)
    with pytest.raises(RuntimeError, match=rf"^{NAMES.get(op, op)}: has no derivative in forward mode"):
        transform(f, x)


@each_op
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(several(x)).sum())(x),
        lambda f, x: torch.vmap(torch.func.grad(f))(several(x)),
    ],
    ids=["grad", "jacrev", "grad of vmap", "vmap of grad"],
)
def test_what_torch_func_cannot_differentiate_is_refused_by_name(op, backend, transform):
    f, x = function_of(op, backend)
    with pytest.raises(RuntimeError, match=rf"^{NAMES.get(op, op)}: cannot be differentiated by torch.func"):
        transform(f, x)


@each_op
def test_a_constant_beside_what_is_differentiated(op, backend):
    f, x = function_of(op, backend)
    two = torch.tensor(2.0, dtype=x.dtype)
    assert torch.func.grad(lambda c: c * f(x))(two) == f(x)
    assert torch.func.jvp(lambda c: c * f(x), (two,), (two,)) == (2 * f(x), 2 * f(x))


def test_forward_mode_is_refused_in_compiled_code():
    f, x = function_of("barrier_multiplier", "")
    with pytest.raises(RuntimeError, match=r"^barrier_multiplier: has no derivative in forward mode"):
        torch.compile(lambda x: torch.func.jvp(f, (x,), (x,)), backend="eager")(x)


@each_head
def test_vmap_is_one_call_after_the_other(op, backend):
    """Also for the gradient, which a tensor that vmap has wrapped does not say that it requires."""
    f, x = function_of(op, backend)
    x.requires_grad_()
    found = torch.vmap(f)(several(x))
    wanted = torch.stack([f(each) for each in several(x)])
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(value.square().sum(), x)[0] for value in (found, wanted)]
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(*gradients)


@each_head
def test_several_upstream_gradients_at_once(op, backend):
    f, x = function_of(op, backend)
    x.requires_grad_()
    upstream = torch.tensor([1.0, -2.5, 0.0], dtype=x.dtype)
    (found,) = torch.autograd.grad(f(x), x, upstream, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack([torch.autograd.grad(f(x), x, each)[0] for each in upstream]))


@pytest.mark.parametrize("op", ["log_likelihood", "weighted"])
def test_a_vocabulary_that_ranks_share_is_neither_mapped_nor_differentiated_several_times_at_once(op, one_rank):
    case = Case.plain()
    inputs = everything_weighted(case.build())

    def f(hidden: Tensor) -> Tensor:
        return scalar(op, "reference", case, inputs, inputs.leaves | {"hidden": hidden}, parallel)

    x = inputs.hidden
    with pytest.raises(RuntimeError, match=r"log_likelihood: torch.vmap cannot map a vocabulary that ranks share"):
        torch.vmap(f)(several(x))
    with pytest.raises(RuntimeError, match=r"log_likelihood: has no derivative in forward mode"):
        torch.func.jvp(f, (x.detach(),), (x.detach(),))
    with pytest.raises(RuntimeError, match=r"ranks share have no gradients of several losses at once"):
        torch.autograd.grad(f(x), x, torch.ones(3, dtype=x.dtype), is_grads_batched=True)


@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
def test_weights_that_vmap_has_wrapped_are_constants_too(backend):
    case = Case.plain(dtype=torch.float32)
    inputs = case.build()

    def loss(seq_weight: Tensor) -> Tensor:
        arguments = (inputs.hidden.detach(), inputs.weight, inputs.targets, seq_weight, inputs.cu_seqlens)
        return weighted_log_likelihood(*arguments, backend=backend)[0]

    with pytest.raises(ValueError, match="seq_weight is a constant, got one that requires a gradient"):
        torch.vmap(loss)(several(inputs.seq_weight).requires_grad_())
