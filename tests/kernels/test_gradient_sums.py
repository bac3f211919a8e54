"""When gradients are rounded, and what is held for it: a batch of one chunk needs no fp32 sum of the weight's gradient."""

import pytest
import torch
from head_cases import Case
from test_row_chunks import KERNELS, NEEDS, head_of, run
from torch.utils._python_dispatch import TorchDispatchMode

from l3m_kernels import gradient_sums, row_chunks
from l3m_kernels.row_order import ordered

MANY = 1 << 22  # bytes of workspace: one chunk
NEARLY = 10_000  # with the fp32 sum that one chunk has no need of
FEW = 5000  # several chunks


@pytest.fixture(params=[True, False], ids=["whole waves", "few tiles"])
def rounds(request, monkeypatch):
    """Whether products of these small shapes may write 16 bits; a GPU's tiles decide."""
    monkeypatch.setattr(gradient_sums, "WHOLE_WAVES", 0 if request.param else 1 << 30)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_the_bits_do_not_depend_on_who_rounds(low_memory, weighted, dtype, monkeypatch):
    """One rounding of the same fp32 sums, in the product or after it; unscored rows or none."""
    for unscored in (0.0, 0.4):
        case = Case.plain(dtype=dtype, lengths=(9, 0, 14), unscored=unscored, softcap=None)
        inputs = case.build()
        results = []
        for least in (0, 1 << 30):
            monkeypatch.setattr(gradient_sums, "WHOLE_WAVES", least)
            results.append(run(case, inputs, weighted, MANY, low_memory))
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name
            assert value.isfinite().all(), name


def sums_of(case: Case, workspace: int) -> gradient_sums.GradientSums:
    inputs = case.build()
    hidden = inputs.hidden.detach()
    scored = inputs.targets != case.ignore_index
    head = head_of(case, inputs, workspace, low_memory=False)
    return gradient_sums.GradientSums(hidden, head, ordered(scored, scored), NEEDS, True, None)


@pytest.mark.parametrize(("dtype", "saved"), [(torch.bfloat16, 4), (torch.float16, 0), (torch.float32, 0)])
def test_one_chunk_saves_the_sum_of_a_weight_that_has_sixteen_bits(dtype, saved, rounds):
    """fp16 gradients are multiplied by a power of two, which is taken out of fp32 sums."""
    case = Case.plain(dtype=dtype)
    assert sums_of(case, MANY).saved_by_one_chunk == (saved * case.vocabulary * case.width if rounds else 0)


class Allocated(TorchDispatchMode):
    """Elements of fp32 tensors of the weight's shape that are made, by any op."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.made = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if (
            isinstance(found, torch.Tensor)
            and found.shape == self.shape
            and not (func.is_view or func._schema.is_mutable)
        ):
            self.made.append(found.dtype)
        return found


@pytest.mark.parametrize("workspace", [MANY, NEARLY, FEW])
def test_what_is_made_of_the_weights_size(workspace, rounds, monkeypatch):
    """One chunk: the gradient itself. Several: the fp32 sum, and its rounding at the end. The products are played by a GPU's ops."""
    case = Case.plain(
        dtype=torch.bfloat16, lengths=(40,), unscored=0.0, vocabulary=64, width=16, softcap=None, bias=False
    )
    inputs = case.build()

    def product(a, b, out, exact, accumulate=False):
        """Without the widened operands of a CPU."""
        assert not accumulate or out.dtype == torch.float32
        out.copy_(torch.ones((), dtype=torch.float32))

    monkeypatch.setattr(gradient_sums, "matmul", product)
    monkeypatch.setattr(row_chunks, "matmul", product)
    seen = Allocated(inputs.weight.shape)
    hidden, targets = inputs.hidden.detach(), inputs.targets
    head = head_of(case, inputs, workspace, low_memory=False)
    arguments = (hidden, targets, inputs.seq_weight, inputs.cu_seqlens, head, case.ignore_index, (True, True, False))
    with seen:
        row_chunks.weighted_log_likelihood(KERNELS, *arguments)
    one = workspace >= NEARLY  # the sum that is not needed is room for all rows
    assert seen.made == ([torch.bfloat16] if one and rounds else [torch.float32, torch.bfloat16])
