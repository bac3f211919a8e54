"""Random calls of the functions with other libraries' signatures, against the float64 oracle of the head's ops."""

import random
from dataclasses import replace

import torch
from head_cases import Case
from head_oracle import assert_close_to_oracle
from torch import Tensor

from l3m_kernels import drop_in, set_workspace

FUNCTIONS = ("liger_fused_linear_cross_entropy", "linear_cross_entropy", "selective_log_softmax")


def fuzz(seed: int, large: bool = False) -> float:
    """One call, forward and backward -> the worst error, as a share of what is allowed."""
    draw = random.Random(f"drop in {seed}")
    name, reduction = draw.choice(FUNCTIONS), draw.choice(("mean", "sum", "none"))
    case = Case.hard(seed, large)
    set_workspace(case.workspace)
    selective = name == "selective_log_softmax"
    if not selective:
        capped = case.softcap if name == "liger_fused_linear_cross_entropy" else None
        case = replace(case, temperature=1.0, softcap=capped, padded=False, lengths=(sum(case.lengths),))
    if selective or reduction == "none":
        case = replace(case, differentiated="token")
    inputs = case.build()
    scored = inputs.targets != case.ignore_index
    if not bool(scored.any()):  # then the mean is torch's NaN, or Liger's 0: `test_drop_in`
        reduction = "sum" if reduction == "mean" else reduction
    arguments = {"bias": inputs.bias, "reduction": reduction, "ignore_index": case.ignore_index}
    if selective:
        index, mask = inputs.targets.where(scored, 0), scored.to(draw.choice((torch.int64, torch.bool, torch.float32)))
        options = {"bias": inputs.bias, "temperature": case.temperature, "softcap": case.softcap}
        value = drop_in.selective_log_softmax(inputs.hidden, inputs.weight, index, row_mask=mask, **options)
    elif name == "linear_cross_entropy":
        arguments["linear_bias"] = arguments.pop("bias")
        value = drop_in.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets.long(), **arguments)
    else:
        given = (inputs.hidden, inputs.weight, inputs.targets)
        value = drop_in.liger_fused_linear_cross_entropy(*given, softcap=case.softcap, **arguments)
    weighted = not selective and reduction != "none"
    if weighted:
        each = 1 / int(scored.sum()) if reduction == "mean" else 1.0
        inputs = inputs._replace(seq_weight=torch.full_like(inputs.seq_weight, each))
        found: dict[str, Tensor] = {"loss": value.detach()}
        upstream = value.new_tensor(case.loss_scale)
    else:
        sign = 1 if selective else -1
        found = {"token": sign * value.detach()}
        upstream = sign * inputs.grad_token * case.loss_scale
    if value.requires_grad:
        value.backward(upstream)
    found |= {f"d_{name}": leaf.grad for name, leaf in inputs.leaves.items() if leaf.grad is not None}
    assert len(found) == 1 + sum(leaf.requires_grad for leaf in inputs.leaves.values())
    return max(assert_close_to_oracle(case, inputs, found, weighted, "cpp").values())
