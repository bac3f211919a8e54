"""What the reference's head costs: the products that it makes, counted, and the size of its chunks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l3m_kernels import chunked

T, D, V = 12, 5, 11
UNIT = 2 * D * V  # FLOPs of a product of one row with the vocabulary
SCORED = 9


class Products(TorchDispatchMode):
    """FLOPs of all matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def batch(request):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(request.param)
    weight = torch.randn(V, D, generator=generator).to(request.param)
    targets = torch.randint(V, (T,), generator=generator)
    targets[[0, 5, 11]] = -100
    return hidden, weight, targets, torch.tensor([0, 4, 4, 12])


def head(weight, workspace: int) -> chunked.Head:
    return chunked.Head(weight, None, None, 1.0, workspace)


NEEDS = [(True, True, False), (True, False, False), (False, True, True), (False, False, True), (False, False, False)]


@pytest.mark.parametrize("workspace", [1, 300, 1 << 20])
def test_forward_costs_one_product_of_the_scored_rows(batch, workspace):
    hidden, weight, targets, cu_seqlens = batch
    with Products() as products:
        chunked.log_likelihood(hidden, targets, cu_seqlens, head(weight, workspace), -100)
    assert products.flops == SCORED * UNIT


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("workspace", [1, 300, 1 << 20])
def test_backward_costs_a_product_more_for_each_gradient(batch, workspace, needs):
    """The logits again, and a product each for hidden and weight, of the rows with a gradient."""
    hidden, weight, targets, cu_seqlens = batch
    settings = head(weight, workspace)
    lse = chunked.log_likelihood(hidden, targets, cu_seqlens, settings, -100)[3]
    for grad_sequence, rows in (([1.0, 1.0, 1.0], SCORED), ([1.0, 0.0, 0.0], 3), ([0.0, 0.0, 0.0], 0)):
        upstream = (torch.tensor(grad_sequence), torch.zeros(T))
        with Products() as products:
            chunked.log_likelihood_backward(*upstream, hidden, targets, cu_seqlens, lse, settings, -100, needs)
        assert products.flops == rows * UNIT * (1 + needs[0] + needs[1])


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("workspace", [1, 300, 1 << 20])
def test_weighted_pass_costs_three_products_and_one_where_the_weight_is_zero(batch, workspace, needs):
    hidden, weight, targets, cu_seqlens = batch
    for seq_weight, rows in (([1.0, 1.0, -1.0], SCORED), ([1.0, 0.0, 0.0], 3), ([0.0, 0.0, 0.0], 0)):
        with Products() as products:
            arguments = (hidden, targets, torch.tensor(seq_weight), cu_seqlens, head(weight, workspace), -100)
            chunked.weighted_log_likelihood(*arguments, needs)
        assert products.flops == UNIT * (SCORED + rows * (needs[0] + needs[1]))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("workspace", [1, 1000, 10_000, 64 << 20])
def test_chunks_fit_the_workspace(workspace, softcap):
    """Every row once, in equal chunks, whose logits (and softcap's slope) fit; at least a row at a time."""
    rows = torch.arange(100, 137)
    settings = chunked.Head(torch.zeros(60, 8), None, softcap, 1.0, workspace)
    chunks = chunked._chunks(rows, settings, gradients=True)
    assert torch.equal(torch.cat(chunks), rows)
    row_bytes = 4 * 60 * (1 if softcap is None else 2)
    assert all(len(chunk) * row_bytes <= max(workspace, row_bytes) for chunk in chunks)
    assert len({len(chunk) for chunk in chunks[:-1]}) <= 1
    assert (len(chunks) == 1) == (workspace == 64 << 20)
