"""PyTorch's own samples and error inputs of `linear_cross_entropy`, through our ops.

The samples have weights of the classes, probabilities for targets and K-dimensional losses, which our drop-in refuses; the adapter makes
all of them of `log_likelihood` alone, since each is a sum of log-likelihoods. They want the package expecttest, which
torch.testing._internal imports.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from head_cases import HEAD_BACKENDS
from parts import Found, Skipped, each
from torch import Tensor

from l3m_kernels import drop_in, log_likelihood

REDUCTIONS = ("mean", "sum", "none")
TOLERANCES = {  # torch.testing.assert_close's
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
}


class Call(NamedTuple):
    """Of `F.linear_cross_entropy`."""

    what: str
    input: Tensor
    linear_weight: Tensor
    target: Tensor
    options: dict[str, Any]  # by name

    def of(self, function: Callable[..., Tensor]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says where it does without its own options
            return function(self.input, self.linear_weight, self.target, **self.options)

    def leaves(self) -> list[Tensor]:
        tensors = (self.input, self.linear_weight, self.target, *self.options.values())
        return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]

    def exact(self) -> Call:
        """In float64, and without what torch may do to save memory."""

        def wide(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        options = {name: wide(value) for name, value in self.options.items() if name != "options"}
        return Call(self.what, wide(self.input), wide(self.linear_weight), wide(self.target), options)


def op_infos() -> list[Any]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Skipped("torch 2.13 has linear_cross_entropy and its samples")
    if importlib.util.find_spec("expecttest") is None:
        raise Skipped("torch's samples want the package expecttest: pip install expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return [info for info in op_db if info.name == "nn.functional.linear_cross_entropy"]


@functools.lru_cache(1)
def samples(number: int) -> list[Call]:
    """All of torch's, each with every reduction, with random numbers of this round."""
    torch.manual_seed(number)
    random.seed(number)
    found = []
    for info in op_infos():
        for dtype in TOLERANCES:
            for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
                for reduction in REDUCTIONS:
                    what = f"{info.variant_test_name or 'plain'}, {dtype}, {reduction}"
                    linear_weight, target = sample.args
                    options = sample.kwargs | {"reduction": reduction}
                    found.append(Call(what, sample.input, linear_weight, target, options))
    return found


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    options: Any = None,
    backend: str,
) -> Tensor:
    """All that torch's can, of `log_likelihood`: -sum_c w_c p_c log pi(c), a head for each place of a K-dimensional loss."""
    ignored = -100 if ignore_index is None else ignore_index
    classes, width = linear_weight.shape[0], linear_weight.shape[-1]
    rows = input.reshape(-1, width)
    heads = linear_weight.reshape(classes, -1, width).unbind(1)
    biases = [None] * len(heads) if linear_bias is None else linear_bias.reshape(classes, -1).unbind(1)
    probable = target.is_floating_point()
    weights = rows.new_ones(classes) if weight is None else weight
    losses, shares = [], []
    for place, (head, bias) in enumerate(zip(heads, biases, strict=True)):
        if probable:
            wanted = target.reshape(len(rows), classes, -1)[:, :, place]
            hidden, ids = rows.repeat_interleave(classes, 0), torch.arange(classes).repeat(len(rows))
            ignore = -100
        else:
            wanted = target.reshape(len(rows), -1)[:, place]
            hidden, ids, ignore = rows, wanted, ignored
        offsets = torch.tensor([0, len(ids)])
        token = log_likelihood(hidden, head, ids, offsets, bias=bias, ignore_index=ignore, backend=backend).token
        if probable:
            losses.append(-(token.view(wanted.shape) * wanted * weights).sum(1))
            shares.append(torch.ones_like(losses[-1]))
        else:
            scored = wanted != ignored
            shares.append(torch.where(scored, weights[wanted.where(scored, 0)], 0).to(token.dtype))
            losses.append(-token * shares[-1])
    loss, share = torch.stack(losses, 1), torch.stack(shares, 1)
    if reduction == "none":
        return loss.reshape((*input.shape[:-1], *linear_weight.shape[1:-1]))
    return loss.sum() if reduction == "sum" else loss.sum() / (loss.numel() if probable else share.sum())


def with_gradients(call: Call, function: Callable[..., Tensor], seed: int) -> list[Tensor]:
    """The loss, and its gradients in the leaves for some upstream gradient."""
    loss = call.of(function)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(loss.shape, dtype=torch.float64, generator=generator).to(loss.dtype)
    leaves = call.leaves()
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def share(found: list[Tensor], wanted: list[Tensor], torchs: list[Tensor], call: Call) -> float:
    """The worst error as a share of what torch's tests allow and 1.5 times torch's own, which in 16 bits is what there is to win.

    Of a K-dimensional loss, or of probabilities, the gradients of several calls of the op are added up, in the leaves' dtype.
    """
    relative, absolute = TOLERANCES[call.input.dtype]
    several = call.linear_weight.dim() > 2 or call.target.is_floating_point()
    rounding = several * torch.finfo(call.input.dtype).eps
    worst = 0.0
    for ours, theirs, truth in zip(found, torchs, wanted, strict=True):
        if ours.shape != truth.shape:
            raise AssertionError(f"shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}")
        if not truth.numel():
            continue
        allowed = absolute + relative * truth.abs() + 1.5 * (theirs.double() - truth).abs().max()
        allowed += rounding * truth.abs().max()
        worst = max(worst, ((ours.double() - truth).abs() / allowed).max().item())
    return worst


REFUSED = re.compile(r"^linear_cross_entropy: (weight|target|linear_weight|options\.\w+) must be ")


def sample(seed: int, found: Found) -> float:
    calls = samples(0)
    call = samples(seed // len(calls))[seed % len(calls)]
    wanted = with_gradients(call.exact(), F.linear_cross_entropy, seed)
    torchs = with_gradients(call, F.linear_cross_entropy, seed)
    backend = random.Random(seed).choice(HEAD_BACKENDS)
    worst = share(with_gradients(call, partial(linear_cross_entropy, backend=backend), seed), wanted, torchs, call)
    for options in (call.options, {name: value for name, value in call.options.items() if name != "options"}):
        try:
            ours = with_gradients(call._replace(options=options), drop_in.linear_cross_entropy, seed)
        except ValueError as error:
            if not REFUSED.match(str(error)):
                raise
        else:
            found.sums["computed by the drop-in"] = found.sums.get("computed by the drop-in", 0) + 1
            return max(worst, share(ours, wanted, torchs, call))
    found.sums["refused by the drop-in"] = found.sums.get("refused by the drop-in", 0) + 1
    return worst


def sampled(seeds: range) -> Found:
    counted = Found()
    found = each(partial(sample, found=counted), seeds)
    found.sums = counted.sums
    found.figures = {"samples of torch": len(samples(0)) // len(REDUCTIONS)}
    return found


def counted(found: Found) -> None:
    found.figures |= {name: int(value) for name, value in found.sums.items()}


@functools.lru_cache(1)
def error_calls() -> list[tuple[Call, type[Exception]]]:
    """torch's error inputs, and calls that torch refuses too; with what it raises."""
    calls = []
    for dtype in TOLERANCES:
        for error in op_infos()[0].error_inputs("cpu"):
            given = error.sample_input
            x, w, t = (tensor.to(dtype) for tensor in (given.input, *given.args))
            calls.append(Call(error.error_regex, x, w, t, given.kwargs))
        x, w, t = torch.randn(4, 3).to(dtype), torch.randn(5, 3).to(dtype), torch.tensor([0, 4, 2, 1])
        for name, options in (
            ("reduction", {"reduction": "average"}),
            ("label_smoothing above 1", {"label_smoothing": 1.5}),
            ("weight of another size", {"weight": x.new_ones(4)}),
            ("linear_bias of another dtype", {"linear_bias": torch.ones(5, dtype=torch.complex64)}),
        ):
            calls.append(Call(name, x, w, t, options))
        calls += [
            Call("a target of V", x, w, torch.tensor([0, 5, 2, 1]), {}),
            Call("a target of -1", x, w, torch.tensor([0, -1, 2, 1]), {}),
            Call("a target of -100 where another is ignored", x, w, torch.tensor([0, -100, 2, 1]), {"ignore_index": 3}),
            Call("too few targets", x, w, t[:3], {}),
            Call("a column of targets", x, w, t[:, None], {}),
            Call("targets of bool", x, w, t > 1, {}),
            Call("another dtype of the head", x, w.to(torch.complex64), t, {}),
            Call("a head for wider states", x, torch.randn(5, 4).to(dtype), t, {}),
            Call("whole numbers", x.long(), w.long(), t, {}),
            Call("no classes", x, w[:0], t, {}),
        ]
    found = []
    for call in calls:
        try:
            call.of(F.linear_cross_entropy)
        except Exception as error:
            found.append((call, type(error)))
        else:
            raise AssertionError(f"torch computes {call.what}")
    return found


NAMED = re.compile(
    r"^(linear_cross_entropy|weighted_log_likelihood|log_likelihood): "
    r"(input|hidden|linear_weight|weight|target|targets|bias|reduction|label_smoothing|ignore_index)\b"
)


def refused(seed: int) -> None:
    """A ValueError, or the IndexError that torch raises too, that begins with the argument's name."""
    call, theirs = error_calls()[seed % len(error_calls())]
    wanted = (ValueError, IndexError) if issubclass(theirs, IndexError) else (ValueError,)
    try:
        call.of(drop_in.linear_cross_entropy)
    except wanted as error:
        if not NAMED.match(str(error)):
            raise AssertionError(f"{call.what}: does not begin with the argument: {error}") from error
    except Exception as error:
        raise AssertionError(f"{call.what}: wanted {wanted}, got {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"{call.what}: torch raises {theirs.__name__}, the drop-in computes")
