"""G5: errors of 16-bit gradients and log-likelihoods have no direction: a rounding that is cut off, or an exponential that is always
too small, adds up over the steps of a run where errors of either sign do not.

Of each result the errors of all elements of all cases: their mean, as a share of their standard deviation, as they are and with the sign
of the truth (so that numbers that are always made smaller are seen, whatever their signs).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from parts import Found, Part
from torch import Tensor
from trust_heads import PATHS, instructions, native_path

LARGEST = 0.1  # of the standard deviation
LEAST = 1000  # elements


def bias(backend: str, path: str | None, dtype: torch.dtype, seeds: range) -> Found:
    from head_cases import Case
    from head_oracle import unfused

    from l3m_kernels import log_likelihood, set_workspace, weighted_log_likelihood

    if path is not None:
        native_path(path)
    if backend == "triton":
        import interpreter

        interpreter.prepare()
    torch.set_num_threads(1)
    set_workspace(None)
    found = Found()
    for seed in seeds:
        case = replace(Case.random(seed), dtype=dtype, frozen=(), view="contiguous", padded=False, bias=True)
        case = replace(case, unscored=min(case.unscored, 0.3), vocabulary=max(case.vocabulary, 2), lengths=(5, 1, 7))
        inputs, weighted = case.build(), seed % 2 == 0
        options = {"bias": inputs.bias, "backend": backend, **case.options}
        given = (inputs.hidden, inputs.weight, inputs.targets)
        if weighted:
            loss, out = weighted_log_likelihood(*given, inputs.seq_weight, inputs.cu_seqlens, **options)
            loss.backward()
        else:
            out = log_likelihood(*given, inputs.cu_seqlens, **options)
            torch.autograd.backward((out.sequence, out.token), (inputs.grad_sequence, inputs.grad_token))
        truth = unfused(case, inputs, torch.float64, weighted)
        values = {"token": out.token.detach(), "d_hidden": inputs.hidden.grad, "d_weight": inputs.weight.grad}
        for name, value in values.items():
            assert value is not None
            add_errors(found, name, value, truth[name])
        found.cases += 1
    return found


def add_errors(found: Found, name: str, value: Tensor, truth: Tensor) -> None:
    """Of a case, relative to the largest number in it; what has to be 0 has no direction."""
    largest = truth.abs().max().item() if truth.numel() else 0.0
    if not largest:
        return
    wanted = truth != 0
    error = (value.double() - truth)[wanted] / largest
    sums = {"count": error.numel(), "squares": error.square().sum().item(), "signed": error.sum().item()}
    sums["grown"] = (error * truth[wanted].sign()).sum().item()
    for kind, number in sums.items():
        found.sums[f"{name} {kind}"] = found.sums.get(f"{name} {kind}", 0.0) + number


def close(found: Found) -> None:
    for name in ("token", "d_hidden", "d_weight"):
        count, squares = (found.sums.get(f"{name} {kind}", 0.0) for kind in ("count", "squares"))
        if count < LEAST or not squares > 0:
            found.fail(f"{name}: {count:.0f} elements with a sum of squared errors of {squares:.3g} say nothing")
            continue
        for kind, title in (("signed", "mean error"), ("grown", "mean growth")):
            mean = found.sums[f"{name} {kind}"] / count
            share = abs(mean) / (squares / count - mean**2) ** 0.5
            found.figures[f"{name}, {title} over standard deviation"] = share
            found.measure(share / LARGEST, f"{name}, {title}")
            if not share <= LARGEST:
                found.fail(f"{name}: {title} {share:.3g} of the standard deviation, of {count:.0f} elements")


def parts() -> list[Part]:
    found, here = [], instructions()
    for path, (flag, _) in PATHS.items():
        for dtype in (torch.bfloat16, torch.float16):
            if dtype == torch.float16 and path != "avx2":
                continue  # it is widened to fp32, on any path
            environment = {"L3M_CPU": path} if not flag or flag in here else {}
            run = partial(bias, "cpp", path, dtype)
            name = f"cpp {path} {str(dtype)[6:]}"
            found.append(Part(name, run, 10_000, seconds=25, piece=2500, environment=environment, close=close))
    for dtype in (torch.bfloat16, torch.float16):
        name = f"reference {str(dtype)[6:]}"
        run = partial(bias, "reference", None, dtype)
        found.append(Part(name, run, 10_000, slice=200, seconds=30, piece=2500, close=close))
    run = partial(bias, "cpp", None, torch.bfloat16)
    found.append(Part("cpp bfloat16", run, 0, slice=800, close=close))
    return found
