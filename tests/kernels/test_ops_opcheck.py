"""torch.library.opcheck of the head's ops: schema, fake, autograd registration and traced against eager."""

import pytest
import torch
from head_cases import BOTH, HEAD_BACKENDS, VIEWS, WEIGHTED_BACKENDS, Case, Inputs

from l3m_kernels.checks import Batch, packed_batch
from l3m_kernels.ops import (
    _log_likelihood,
    _log_likelihood_backward,
    _once_differentiable,
    _weighted_log_likelihood,
)

slow = pytest.mark.slow
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
FULL = (*QUICK, "test_aot_dispatch_dynamic")
OPCHECK = [
    *((seed, QUICK) for seed in range(60)),
    *((seed, FULL) for seed in range(60, 70)),
    *(pytest.param(seed, FULL, marks=slow) for seed in range(1000, 1500)),
]


def packed(case: Case, inputs: Inputs) -> Batch:
    """What the public function hands to its op, as leaves."""
    options = (inputs.targets, inputs.cu_seqlens, inputs.bias, case.softcap, case.temperature)
    batch = packed_batch("op", inputs.hidden, inputs.weight, *options)
    hidden, weight, bias = (
        None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
        for tensor in (batch.hidden, batch.weight, batch.bias)
    )
    return batch._replace(hidden=hidden, weight=weight, bias=bias)


def options_of(case: Case, inputs: Inputs, backend: str) -> tuple:
    """softcap, temperature, ignore_index, scored (with every other seed), backend"""
    scored = int((inputs.targets != case.ignore_index).sum()) if case.seed % 2 else None
    return case.softcap, case.temperature, case.ignore_index, scored, backend


def opcheck(op, arguments, tests) -> None:
    torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", HEAD_BACKENDS)
@pytest.mark.parametrize(("seed", "tests"), OPCHECK)
def test_opcheck_log_likelihood(seed, tests, backend):
    case = Case.random(seed)
    inputs = case.build()
    batch = packed(case, inputs)
    opcheck(_log_likelihood, (*batch, *options_of(case, inputs, backend)), tests)


@pytest.mark.parametrize("backend", HEAD_BACKENDS)
@pytest.mark.parametrize(("seed", "tests"), OPCHECK)
def test_opcheck_log_likelihood_backward(seed, tests, backend):
    """On constants: it is the op that refuses to be differentiated."""
    case = Case.random(seed)
    inputs = case.build()
    batch = packed(case, inputs)
    options = options_of(case, inputs, backend)
    lse = _log_likelihood(*batch, *options)[-1].detach()
    hidden, weight, targets, cu_seqlens, bias = (None if tensor is None else tensor.detach() for tensor in batch)
    needs = [name in inputs.leaves and name not in case.frozen for name in ("hidden", "weight", "bias")]
    upstream = (inputs.grad_sequence, inputs.grad_token.flatten())
    opcheck(
        _log_likelihood_backward, (*upstream, hidden, weight, targets, cu_seqlens, bias, lse, *options, *needs), tests
    )


@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
@pytest.mark.parametrize(("seed", "tests"), OPCHECK)
def test_opcheck_weighted_log_likelihood(seed, tests, backend):
    case = Case.random(seed)
    inputs = case.build()
    hidden, weight, targets, cu_seqlens, bias = packed(case, inputs)
    options = options_of(case, inputs, backend)
    needs = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    arguments = (hidden, weight, targets, inputs.seq_weight, cu_seqlens, bias, *options, *needs)
    opcheck(_weighted_log_likelihood, arguments, tests)


@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize(("op", "backend"), BOTH)
def test_opcheck_strided_inputs(op, backend, layout):
    """What the fake says of strides holds for each layout of the inputs: compiled code relies on it."""
    case = Case.plain(dtype=torch.float32, view=layout)
    inputs = case.build()
    batch = packed(case, inputs)
    options = options_of(case, inputs, backend)
    if op == "log_likelihood":
        opcheck(_log_likelihood, (*batch, *options), FULL)
        lse = _log_likelihood(*batch, *options)[-1].detach()
        constants = (tensor.detach() for tensor in (*batch, lse) if tensor is not None)  # bias is there
        arguments = (inputs.grad_sequence, inputs.grad_token, *constants, *options, True, True, True)
        opcheck(_log_likelihood_backward, arguments, FULL)
    else:
        arguments = (batch.hidden, batch.weight, batch.targets, inputs.seq_weight, batch.cu_seqlens, batch.bias)
        opcheck(_weighted_log_likelihood, (*arguments, *options, True, True, True), FULL)


@pytest.mark.parametrize("layout", VIEWS)
def test_opcheck_once_differentiable(layout):
    case = Case.plain(dtype=torch.float32, view=layout)
    leaves = {name: leaf.detach() for name, leaf in case.build().leaves.items()}
    for leaf in leaves.values():
        opcheck(_once_differentiable, (leaf, *leaves.values()), FULL)


def test_every_op_of_the_package_is_checked():
    """A new op belongs into one of the tests of opcheck, here or in those of the barrier; then into this list.

    `cpp_` ops are what backend "cpp" runs inside of these.
    """
    head = {"log_likelihood", "log_likelihood_backward", "weighted_log_likelihood", "once_differentiable"}
    barrier = {"relaxed_log_barrier", "barrier_multiplier", "barrier_curvature", "barrier_weights"}
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("l3m_kernels::")}
    assert {name for name in names if not name.startswith("cpp_")} == head | barrier
