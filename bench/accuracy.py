"""Errors of the head where logits are large, as multiples of those of the unfused op in fp32: `python bench/accuracy.py`.

Log-likelihoods of tokens, and for fp32 the gradients, against float64: root mean square and worst. What grows with the width D is the
error of the product; a head that adds up all of D in one chain is at 7 to 9 at D = 4096.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from l3m_kernels import weighted_log_likelihood


def head(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> dict[str, Tensor]:
    """Log-likelihoods of the tokens and the gradients of minus their sum."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ends = torch.tensor([0, len(targets)])
    loss, seen = weighted_log_likelihood(hidden, weight, targets, torch.ones(1), ends, backend=backend)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"token": seen.token.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by torch, in `dtype`."""
    hidden, weight = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight))
    token = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    (-token.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"token": token.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}


def ratios(
    rows: int, width: int, vocabulary: int, size: float, dtype: torch.dtype, backend: str
) -> dict[str, tuple[float, float]]:
    """By name: (root mean square, worst) error over that of the unfused op in fp32. Logits have a spread of `size`."""
    generator = torch.Generator().manual_seed(0)
    hidden = (size * torch.randn(rows, width, generator=generator)).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    truth = unfused(hidden, weight, targets, torch.float64)
    torchs, ours = unfused(hidden, weight, targets, torch.float32), head(hidden, weight, targets, backend)
    found = {}
    for name in truth if dtype == torch.float32 else ["token"]:  # 16-bit gradients are rounded to 16 bits
        one, other = (values[name].double() - truth[name] for values in (ours, torchs))
        found[name] = ((one.norm() / other.norm()).item(), (one.abs().max() / other.abs().max()).item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cpp")
    parser.add_argument("--size", type=float, nargs="+", default=[1.0, 30.0], help="spread of the logits")
    given = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        for size in given.size:
            for rows, width, vocabulary in ((256, 300, 1000), (256, 1024, 4000), (2048, 512, 4000), (256, 4096, 4000)):
                found = ratios(rows, width, vocabulary, size, dtype, given.backend)
                text = "  ".join(f"{name} {rms:.2f} (worst {worst:.2f})" for name, (rms, worst) in found.items())
                print(f"{str(dtype)[6:]:9} logits of {size:g}, {rows} rows, D = {width:4}, V = {vocabulary}: {text}")


if __name__ == "__main__":
    main()
