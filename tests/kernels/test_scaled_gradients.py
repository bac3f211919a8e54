"""What `.backward()` of a weighted loss does to the gradients that the forward formed: no pass over them where the loss itself is meant."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from l3m_kernels import ops


class Scale:
    """Plays a backend's kernel, which works in place and sees the number on the device."""

    def __init__(self):
        self.calls = 0

    def __call__(self, values: Tensor, factor: Tensor) -> None:
        self.calls += 1
        values.mul_(factor)


@pytest.fixture
def kernel(monkeypatch) -> Scale:
    """A GPU whose numbers the host does not see, played by CPU tensors."""
    scale = Scale()
    monkeypatch.setattr(ops, "_kernel_for", lambda gradient, upstream, backend: scale)
    monkeypatch.setattr(Tensor, "item", lambda tensor: pytest.fail("the host waited for the number"))
    return scale


@pytest.fixture
def kept(monkeypatch, request) -> bool:
    monkeypatch.setattr(ops, "_get_current_graph_task_keep_graph", lambda: request.param)
    return request.param


@pytest.mark.parametrize("kept", [False, True], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_where_nobody_else_will_read_it(dtype, kept, kernel, monkeypatch):
    monkeypatch.setattr(
        Tensor, "device", property(lambda _: torch.device("meta"))
    )  # no CPU, whose numbers are looked at
    gradient = torch.linspace(-3, 3, 12).to(dtype)
    wanted, held = gradient * torch.tensor(0.3), gradient.clone()
    with torch.no_grad():
        found = ops._scaled(gradient, torch.tensor(0.3), dtype, "auto")
    assert torch.equal(found, wanted)
    assert found.dtype == dtype
    assert kernel.calls == (0 if kept else 1)
    assert torch.equal(gradient, held if kept else wanted)


@pytest.mark.parametrize("kept", [False], indirect=True)
def test_a_gradient_that_is_rounded_now_is_rounded_once(kept):
    """fp16: fp32 until the loss scale is in it."""
    gradient = torch.linspace(-3, 3, 12) * 2.0**-20
    with torch.no_grad():
        found = ops._scaled(gradient, torch.tensor(1000.0), torch.float16, "auto")
    assert torch.equal(found, (gradient.double() * 1000).half())


def test_a_traced_graph_multiplies_by_whatever_it_is_given():
    def gradients(hidden: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        loss, _ = ops.weighted_log_likelihood(hidden, weight, torch.zeros(2, 3, dtype=torch.int64), torch.ones(2))
        return torch.autograd.grad(loss, (hidden, weight), upstream)

    leaves = (torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True))
    graph = make_fx(gradients)(*leaves, torch.tensor(1.0))
    arguments = (*leaves, torch.tensor(3.0))
    assert all(map(torch.equal, graph(*arguments), gradients(*arguments)))


def test_a_capture_has_a_copy(monkeypatch):
    """Its replays may find a gradient that an earlier one has scaled."""

    class Cuda:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    monkeypatch.setattr(ops, "scale_in_place", lambda op, backend, device: max)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        found = ops._kernel_for(torch.ones(3), Cuda(), "auto")  # type: ignore[arg-type]
        assert found is (None if capturing else max)
    assert ops._kernel_for(torch.ones(3), torch.ones(()), "auto") is None
    assert ops._kernel_for(torch.ones(3, 2).t(), Cuda(), "auto") is None  # type: ignore[arg-type]
