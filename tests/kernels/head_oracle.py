"""The float64 oracle of the head's ops, and how far from it an op may be.

Letters: T tokens, N sequences, L padded length, D hidden size, V vocabulary.

The error of an element is counted in units: ulps, of the precision that the op computes in, at the size of the terms that were added up to
make the element (its condition scale). A log-likelihood is a difference of numbers of the logits' size, so an ulp of a log-likelihood
near 0 would measure luck. An op may have 1.5 times the worst error, in units, of the unfused op + 2 units (of few elements, whose worst
says less, twice); and no element more than 1.5 times the unfused op's error of it + 8 eps of its scale. The latter alone is asked where
numbers are unusual: where logits share a large part, so do their errors in the unfused op, and cancel, but not in an op that has the
target's logit from elsewhere. The unfused op runs in the compute precision (16-bit inputs widened), so what is asked of bf16 is more than
being as good as the unfused op in bf16. One exception: where a backend multiplies in bf16 (`multiplies_in`), the gradients of the logits
are rounded to it, as the unfused op's are; bf16 is then the precision of the gradients, the unfused op's are those in bf16, and an element
may have a bf16 eps of its products more, and what its smallest numbers come to (`smallest`). fp16 likewise.

A result of 16 bits is right wherever it is the rounding of what would be: its own rounding is no error (`distance`).
"""

import math
from dataclasses import replace

import torch
from head_cases import Case, Inputs, sequence_of
from torch import Tensor

from l3m_kernels.backends import NATIVE
from l3m_kernels.gradient_sums import LARGEST_HALF
from l3m_kernels.reference import eager_log_likelihood

FLOAT64_UNITS = 32  # 7e-15 of the condition scale
LONGEST_CHAIN = 1024  # of a sum; parts of longer ones are added up apart
FEW = 5000  # elements, of which the worst of one op says little about that of another
TOKEN_ABSOLUTE = 1e-3  # of a token's log-likelihood, whatever the inputs' dtype, where logits are less than 1000


def multiplies_in(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a backend has the gradients of the logits when it multiplies them out."""
    if dtype == torch.bfloat16 and backend == "cpp" and NATIVE.module.cpu_path() in ("amx", "avx512_bf16"):  # type: ignore[union-attr]
        return dtype
    if backend in ("triton", "cuda"):
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def unfused(case: Case, inputs: Inputs, dtype: torch.dtype, weighted: bool) -> dict[str, Tensor]:
    """Outputs and gradients of the unfused op, computed in `dtype` throughout."""
    leaves = {name: leaf.detach().to(dtype).contiguous().requires_grad_() for name, leaf in inputs.leaves.items()}
    hidden = leaves["hidden"].reshape(-1, case.width)
    targets = inputs.targets.long().reshape(-1)
    token = eager_log_likelihood(hidden, leaves["weight"], targets, leaves.get("bias"), **case.options)
    sequence = token.new_zeros(len(inputs.seq_weight)).index_add(0, sequence_of(inputs), token)
    if weighted:
        value = -(inputs.seq_weight.to(dtype) * sequence).sum()
    else:
        value = (inputs.grad_sequence.to(dtype) * sequence).sum()
        value = value + (inputs.grad_token.to(dtype).flatten() * token).sum()
    (value * case.loss_scale).backward()
    result = {"token": token.detach().view(inputs.targets.shape), "sequence": sequence.detach()}
    if weighted:
        result["loss"] = value.detach()
    return result | {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def condition_scales(case: Case, inputs: Inputs, weighted: bool) -> dict[str, Tensor]:
    """For each output and gradient, the size of the terms that are added up to make its elements, in float64.

    "d_hidden products" and so on: the same of the products alone, as if the gradients of the logits were exact.
    """
    hidden = inputs.hidden.detach().double().reshape(-1, case.width)
    weight, targets = inputs.weight.detach().double(), inputs.targets.long().reshape(-1)
    bias = None if inputs.bias is None else inputs.bias.detach().double()
    sequence = sequence_of(inputs)
    scored = targets != case.ignore_index
    column = targets.where(scored, 0)[:, None]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if case.softcap is not None:
        logits = case.softcap * (logits / case.softcap).tanh()
    log_probability = (logits / case.temperature).log_softmax(1)  # (T, V)
    probability = log_probability.exp()
    absolute = weight.abs()
    sizes = torch.nn.functional.linear(hidden.abs(), absolute, None if bias is None else bias.abs())
    of_target = sizes.gather(1, column)[:, 0]
    if bias is not None:  # tokens that are ruled out have no part in it
        sizes = sizes.masked_fill_(probability == 0, 0.0)
    size = torch.maximum(sizes.amax(1), of_target) / case.temperature  # (T,) of the logits
    token = torch.where(scored, size - log_probability.gather(1, column)[:, 0], 0)
    per_sequence = token.new_zeros(len(inputs.seq_weight)).index_add(0, sequence, token)
    if weighted:
        upstream = inputs.seq_weight.double().abs()[sequence]
    else:
        upstream = inputs.grad_sequence.double().abs()[sequence] + inputs.grad_token.double().abs().flatten()
    upstream = (upstream * scored * abs(case.loss_scale / case.temperature))[:, None]
    rest = 1 - probability.gather(1, column)
    scales = {"token": token.view(inputs.targets.shape), "sequence": per_sequence}
    spread = 2 + size[:, None] + math.log(case.vocabulary)
    exact = (probability * upstream).scatter_(1, column, rest * upstream)
    around = (probability * (upstream * spread)).scatter_add_(1, column, rest * upstream)
    if case.softcap is not None:  # the slope of the cap, as far as the logits before it are known
        before = sizes
        around += exact * before * (2 / case.softcap) * (1 - (logits / case.softcap).square()).clamp(min=0)
    for name, d_logits in (("", around), (" products", exact)):
        scales[f"d_hidden{name}"] = (d_logits @ absolute).view(inputs.hidden.shape)
        scales[f"d_weight{name}"] = d_logits.T @ hidden.abs()
        scales[f"d_bias{name}"] = d_logits.sum(0)
    least = smallest(case.dtype, upstream.amax().item() if upstream.numel() else 0.0)
    scales["d_hidden smallest"] = least * absolute.sum(0)
    scales["d_weight smallest"] = least * (hidden.abs() * scored[:, None]).sum(0)
    scales["d_bias smallest"] = least * scored.sum()
    if weighted:
        scales["loss"] = (inputs.seq_weight.double().abs() * per_sequence).sum()
    return scales


def smallest(operands: torch.dtype, upstream: float) -> float:
    """How far a gradient of a logit may be from one that was rounded to 16 bits because it is too small for them.

    fp16: half of its smallest number, after the scaling that brings the largest upstream gradient to 2^14, so 2^-39 of that gradient.
    bf16: instructions take subnormal operands, a gradient or an exponential, for 0.
    """
    if operands == torch.float16:
        return 2.0 ** (math.frexp(upstream)[1] - LARGEST_HALF - 25)
    return torch.finfo(torch.bfloat16).tiny * max(upstream, 1.0)


def unfused_logit_units(case: Case, inputs: Inputs, dtype: torch.dtype) -> float:
    """Worst error of a logit of the unfused op in `dtype`, in units of a token's log-likelihood.

    Where all rows are one row, so are all logits and their errors: in the unfused op's difference of them nothing is left of it. An op that
    has the target's logit from elsewhere, more precise even, has the whole error of the others, and no other row to show it.
    """
    hidden, weight = inputs.hidden.detach().reshape(-1, case.width), inputs.weight.detach()
    if not hidden.numel():
        return 0.0
    exact = hidden.double() @ weight.double().T
    error = (hidden.to(dtype) @ weight.to(dtype).T).double() - exact
    size = hidden.double().abs() @ weight.double().abs().T
    return (error.abs() / ulp(size, dtype)).max().item()


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of the numbers of `dtype` at `size` (float64); that of the smallest normal number below it."""
    information = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=information.tiny)).exponent
    return information.eps * torch.exp2(exponent.double() - 1)


def distance(value: Tensor, truth: Tensor) -> Tensor:
    """How far the truth (float64) is from what is rounded to `value`: what is wrong with it beyond its own rounding.

    Of 16-bit numbers, whose rounding is a part of every error; of wider ones it is the error.
    """
    wide = value.double()
    error = (wide - truth).abs()
    if value.dtype.itemsize > 2:
        return error
    information = torch.finfo(value.dtype)
    mantissa, _ = torch.frexp(wide)
    away = ulp(wide.abs(), value.dtype) / 2
    towards = torch.where((mantissa.abs() == 0.5) & (wide.abs() > information.tiny), away / 2, away)
    found = (error - torch.where(truth.abs() > wide.abs(), away, towards)).clamp(min=0)
    largest = information.max * (1 + information.eps / 4)  # what is beyond is rounded to infinity
    overflown = (largest - truth * wide.sign()).clamp(min=0)
    return torch.where(wide.isinf(), overflown, found)


def assert_close_to_oracle(
    case: Case, inputs: Inputs, found: dict[str, Tensor], weighted: bool, backend: str = "reference"
) -> dict[str, float]:
    """Every value of `found` is as near to the float64 oracle as the module's docstring says.

    -> the worst error of each, as a share of what is allowed.
    """
    oracle = unfused(case, inputs, torch.float64, weighted)
    scales = condition_scales(case, inputs, weighted)
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    baseline = oracle if compute == torch.float64 else unfused(case, inputs, compute, weighted)
    operands = multiplies_in(backend, case.dtype)
    if operands != compute:
        baseline |= _gradients_in(operands, case, inputs, baseline, weighted)
    worst = {}
    for name, value in found.items():
        if not value.numel():
            worst[name] = 0.0
            continue
        allowed = _allowed(name, case, inputs, oracle[name], baseline[name], scales, compute, operands)
        error = distance(value, oracle[name])
        assert not error.isnan().any(), f"{name} is NaN in {case}"
        worst[name] = torch.where(error == 0, 0, error / allowed).max().item()
        assert worst[name] <= 1, (
            f"{name}: error {error.max().item():.3g}, {worst[name]:.2f} of what is allowed, in {case}"
        )
    return worst


def _gradients_in(
    operands: torch.dtype, case: Case, inputs: Inputs, baseline: dict[str, Tensor], weighted: bool
) -> dict[str, Tensor]:
    """Of the unfused op in 16 bits, in float64; of `baseline`, which is wider, where that overflows on the way, and nothing is left.

    A loss scale that alone is too much for fp16 is made smaller, by a power of two, and multiplied in afterwards.
    """
    given = (inputs.seq_weight,) if weighted else (inputs.grad_sequence, inputs.grad_token)
    largest = sum(float(each.abs().max()) for each in given if each.numel()) / case.temperature
    largest = max(largest, 1.0) * abs(case.loss_scale) / (torch.finfo(operands).max / 8)
    by = 2.0 ** max(0, math.frexp(largest)[1])
    scaled = unfused(replace(case, loss_scale=case.loss_scale / by), inputs, operands, weighted)
    found = {name: value.double() * by for name, value in scaled.items() if name.startswith("d_")}
    return {name: torch.where(value.isfinite(), value, baseline[name].double()) for name, value in found.items()}


def _allowed(
    name: str,
    case: Case,
    inputs: Inputs,
    truth: Tensor,
    baseline: Tensor,
    scales: dict[str, Tensor],
    compute: torch.dtype,
    operands: torch.dtype,
) -> Tensor:
    """Of the value of this name, by element: the smaller of the two limits."""
    gradient = name.startswith("d_")
    # What is made of subnormal numbers has no relative accuracy, nor has a multiple of it.
    least = torch.finfo(compute).tiny / torch.finfo(compute).eps * (max(abs(case.loss_scale), 1) if gradient else 1)
    scale = scales[name] + least
    unit = ulp(scale, operands if gradient else compute)
    # Where all rows are one row, equal terms are rounded alike when they are added up, and their errors add up too: in the order
    # of one op more than in that of another
    equal = case.view == "expanded" and gradient
    terms = case.vocabulary if name == "d_hidden" else inputs.targets.numel()
    added_up = equal * min(terms, LONGEST_CHAIN) / 8
    if compute == torch.float64:
        return max(FLOAT64_UNITS, 2 * added_up) * unit
    error = (baseline.double() - truth).abs()
    units = (error / unit).max().item()
    if case.view == "expanded" and not gradient:
        units = max(units, unfused_logit_units(case, inputs, compute))
    allowed = 1.5 * error + (8 + 1.5 * added_up) * torch.finfo(compute).eps * scale
    if gradient and operands != compute:
        allowed = allowed + torch.finfo(operands).eps * scales[f"{name} products"] + scales[f"{name} smallest"]
    if case.numbers == "normal":
        factor = 1.5 if truth.numel() >= FEW else 2.0
        allowed = torch.minimum(allowed, (factor * max(units, added_up) + 2) * unit)
    if name == "token":
        precise = torch.maximum(8 * torch.finfo(compute).eps * scale, 1.5 * error)
        allowed = torch.minimum(allowed, precise.clamp(min=TOKEN_ABSOLUTE))
    return allowed
