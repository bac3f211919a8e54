"""One optimizer step on 10M parameters: `L3MOptimizer.step()` against `clip_grad_norm_` and `step()` of the same optimizer.

Both get the same gradients, of a norm that is clipped (and one that is not), and are checked against each other first. Rounds of the two
alternate, so that what else the machine does meets both: the ratio of the medians is in `extra_info`.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import l3ms
from l3ms.benchmark.shapes import STEP

BASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=True),
    "sgd_fused": lambda params: torch.optim.SGD(params, lr=1e-4, fused=True),
}
CONSTRAINTS = [l3ms.Length(min=4, max=6), l3ms.Constraint("polite", min=0.5)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in STEP]


def set_gradients(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(params, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(gradient)
        parameter.grad.copy_(gradient)


class Torch:
    """What a training loop does without us."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        self.params = parameters()
        self.base = make(self.params)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.base.step()


class Ours:
    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], half: str):
        self.params, self.half = parameters(), half
        self.optimizer = l3ms.L3MOptimizer(make(self.params), CONSTRAINTS)

    def observe(self) -> None:
        if self.half == "constraint":
            self.optimizer.observe({"length": [3.0, 5.0, 9.0], "polite": [0.1, 0.4, 0.3]})

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("norm", [10.0, 0.1], ids=["clipped", "not-clipped"])
@pytest.mark.parametrize("half", ["task", "constraint"])
@pytest.mark.parametrize("base", BASES)
def test_step(benchmark, base: str, half: str, norm: float) -> None:
    gradients = [torch.randn_like(parameter) for parameter in parameters()]
    total = torch.nn.utils.get_total_norm(gradients)
    gradients = [gradient * (norm / total) for gradient in gradients]
    ours, theirs = Ours(BASES[base], half), Torch(BASES[base])
    if half == "task":
        for _ in range(2):
            for one in (ours, theirs):
                set_gradients(one.params, gradients)
                one.step()
        for found, wanted in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # of 2 steps of 1e-4

    seconds: list[float] = []

    def prepare() -> None:
        set_gradients(theirs.params, gradients)
        start = time.perf_counter()
        theirs.step()
        seconds.append(time.perf_counter() - start)
        set_gradients(ours.params, gradients)
        ours.observe()

    benchmark.group = f"step {base} {half} half-step, gradients {'clipped' if norm > 1 else 'not clipped'}"
    benchmark.pedantic(ours.step, setup=prepare, rounds=30, warmup_rounds=3)
    if benchmark.stats is not None:
        own, plain = benchmark.stats.stats.median, statistics.median(seconds[3:])
        benchmark.extra_info |= {"torch_median": plain, "ratio_to_torch": own / plain}
        assert ours.optimizer.skipped_steps == 0
