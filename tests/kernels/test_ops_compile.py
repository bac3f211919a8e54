"""The head's ops inside torch.compile and autocast: the numbers of the plain call."""

from typing import Any

import pytest
import torch
from head_cases import BOTH
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from l3m_kernels import log_likelihood, weighted_log_likelihood

both = pytest.mark.parametrize(("op", "backend"), BOTH)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Model(torch.nn.Module):
    """A layer, then the head's op: gradients go through both."""

    def __init__(self, op: str, backend: str, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.op = op
        self.options: dict[str, Any] = options | {"backend": backend}
        self.layer = torch.nn.Linear(6, 8)
        self.head = torch.nn.Linear(8, 13)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2

    def forward(self, inputs: Tensor, targets: Tensor, seq_weight: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        hidden = self.layer(inputs).tanh()
        options: dict[str, Any] = self.options | {"bias": self.head.bias}
        if self.op == "weighted":
            return weighted_log_likelihood(hidden, self.head.weight, targets, seq_weight, cu_seqlens, **options)[0]
        out = log_likelihood(hidden, self.head.weight, targets, cu_seqlens, **options)
        return -(seq_weight * out.sequence).sum() + out.token.square().mean()


def batch(sequences: int, length: int, packed: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sequences)
    inputs = torch.randn(sequences, length, 6, generator=generator)
    targets = torch.randint(13, (sequences, length), generator=generator)
    targets[0, 0] = -100
    seq_weight = torch.randn(sequences, generator=generator)
    if not packed:
        return inputs, targets, seq_weight
    cu_seqlens = torch.arange(sequences + 1) * length
    return inputs.flatten(0, 1), targets.flatten(), seq_weight, cu_seqlens


def loss_and_gradients(function, model: Model, arguments: tuple[Any, ...]) -> list[Tensor]:
    loss = function(*arguments)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@both
@pytest.mark.parametrize("packed", [False, True])
def test_fullgraph_and_dynamic_shapes(op, backend, packed):
    """Each batch has another size; from the second on the compiled code is that of a dynamic shape, compiled once."""
    model = Model(op, backend, temperature=0.7, softcap=5.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for sequences, length in ((3, 5), (4, 7), (6, 2), (5, 11)):
        arguments = batch(sequences, length, packed)
        wanted = loss_and_gradients(model, model, arguments)
        found = loss_and_gradients(compiled, model, arguments)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


@both
def test_fullgraph_with_scaled_loss_and_frozen_head(op, backend):
    model = Model(op, backend)
    model.head.requires_grad_(False)
    arguments = batch(3, 5, packed=True)

    def run(function) -> list[Tensor]:
        loss = 3 * function(*arguments)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.layer.parameters()))]

    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on importing inductor
@both
def test_inductor(op, backend):
    """Generated code checks the strides that the fakes promise."""
    model = Model(op, backend, softcap=5.0)
    compiled = torch.compile(model, fullgraph=True)
    for sequences, length in ((3, 5), (4, 7)):
        arguments = batch(sequences, length, packed=False)
        wanted = loss_and_gradients(model, model, arguments)
        torch.testing.assert_close(loss_and_gradients(compiled, model, arguments), wanted, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(op, backend, compiled):
    """As F.linear: products of bf16 inputs; log-likelihoods stay fp32, gradients reach the fp32 parameters."""
    model = Model(op, backend)
    arguments = batch(3, 5, packed=True)
    function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(*arguments)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, list(model.parameters()))

    # The same casts by hand, outside autocast.
    low = [
        leaf.detach().bfloat16().requires_grad_() for leaf in (model.layer.weight, model.layer.bias, model.head.weight)
    ]
    bias = model.head.bias.detach().bfloat16().requires_grad_()
    hidden = torch.nn.functional.linear(arguments[0].bfloat16(), low[0], low[1]).tanh()
    rest, options = (low[2], arguments[1]), {"bias": bias, "backend": backend}
    if op == "weighted":
        wanted, _ = weighted_log_likelihood(hidden, *rest, arguments[2], arguments[3], **options)
    else:
        out = log_likelihood(hidden, *rest, arguments[3], **options)
        wanted = -(arguments[2] * out.sequence).sum() + out.token.square().mean()
    assert torch.equal(loss, wanted)
    for grad, expected in zip(found, torch.autograd.grad(wanted, [*low, bias]), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected.float())


@both
def test_float64_is_left_alone_by_autocast(op, backend):
    hidden, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    targets, cu_seqlens, seq_weight = torch.tensor([0, 4, 2, 1]), torch.tensor([0, 4]), torch.ones(1)

    def run() -> Tensor:
        if op == "weighted":
            return weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, backend=backend)[0]
        return log_likelihood(hidden, weight, targets, cu_seqlens, backend=backend).sequence

    wanted = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), wanted)


@both
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_autocast_leaves_float64_beside_float32_to_be_refused(op, backend, name):
    """As F.linear does: rounded to 16 bits, it would be no longer what was given."""
    tensors = {"hidden": torch.randn(4, 3), "weight": torch.randn(5, 3), "bias": torch.randn(5)}
    tensors[name] = tensors[name].double()
    arguments = {"targets": torch.tensor([0, 4, 2, 1]), "cu_seqlens": torch.tensor([0, 4]), "backend": backend}
    if op == "weighted":
        arguments["seq_weight"] = torch.ones(1)
    function = weighted_log_likelihood if op == "weighted" else log_likelihood
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"dtype .*float64"):
        function(**tensors, **arguments)


def test_a_learnable_temperature_is_refused_by_name_in_compiled_code():
    hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    compiled = torch.compile(lambda t: log_likelihood(hidden, weight, targets, temperature=t).sequence, backend="eager")
    with pytest.raises(ValueError, match=r"^log_likelihood: temperature must be a number, a constant, got"):
        compiled(torch.tensor(0.7, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_grad_scaler(op, backend, dtype):
    """Scale, backward, unscale, step: the parameters of an unscaled step."""
    results = []
    for enabled in (False, True):
        model = Model(op, backend).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        arguments = batch(3, 5, packed=True)
        scaler.scale(model(arguments[0].to(dtype), *arguments[1:])).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)  # the scale is a power of two
