"""Drop-in functions against what they stand for: values, gradients, signatures; and what they refuse, by name.

Liger's kernels need a GPU, so its function is compared with the formula that it computes; where it is installed, its signature too, and in
Triton's interpreter its kernels.
"""

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_kernels import drop_in

ROOT = Path(__file__).resolve().parents[2]
REDUCTIONS = ("mean", "sum", "none")
IGNORED = -7
LIGER = {  # 0.8.5
    "ce_weight": None,
    "ignore_index": -100,
    "lse_square_scale": 0.0,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "softcap": None,
    "return_z_loss": False,
    "accum_dtype": None,
    "use_token_scaling": False,
    "return_token_accuracy": False,
    "return_predicted_tokens": False,
}
torch_has_it = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has F.linear_cross_entropy"
)


def problem(dtype: torch.dtype = torch.float64, ignore: int = IGNORED) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states (11, 6), weight (19, 6), bias (19,); targets (11,), of which 3 are ignored."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"hidden": (11, 6), "weight": (19, 6), "bias": (19,)}
    leaves = {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in shapes.items()
    }
    targets = torch.randint(19, (11,), generator=generator)
    targets[[0, 4, 10]] = ignore
    return leaves, targets


def with_gradients(loss: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    """The loss, and the gradients of it or of a sum with other weights for each of its elements."""
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss) if loss.ndim else None
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), upstream)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert any(tensor.abs().max() > 0.1 for tensor in wanted[1:])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def defaults(function: Callable) -> dict[str, object]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


# ---- torch


@torch_has_it
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore", [None, IGNORED, 5], ids=["-100", "outside", "inside"])
@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "options"])
def test_linear_cross_entropy_is_torchs(reduction, ignore, chunked):
    leaves, targets = problem(ignore=-100 if ignore is None else ignore)
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True, acc_dtype=torch.float64) if chunked else None
    arguments = {"linear_bias": leaves["bias"], "reduction": reduction, "ignore_index": ignore, "options": options}
    found, wanted = (
        with_gradients(function(leaves["hidden"], leaves["weight"], targets, **arguments), leaves)
        for function in (drop_in.linear_cross_entropy, F.linear_cross_entropy)
    )
    assert_equal(found, wanted)


@torch_has_it
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_of_one_sample_and_of_none(reduction):
    leaves, targets = problem()
    del leaves["bias"]
    for rows in (1, slice(0)):
        found, wanted = (
            function(leaves["hidden"][rows], leaves["weight"], targets[rows], reduction=reduction)
            for function in (drop_in.linear_cross_entropy, F.linear_cross_entropy)
        )
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, equal_nan=True)
        if rows == 1:
            assert_equal(with_gradients(found, leaves), with_gradients(wanted, leaves))


@torch_has_it
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_of_bfloat16_it_is_at_least_as_exact_as_torchs(reduction):
    leaves, targets = problem(torch.bfloat16, -100)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}

    def of(function, leaves):
        loss = function(leaves["hidden"], leaves["weight"], targets, linear_bias=leaves["bias"], reduction=reduction)
        return with_gradients(loss, leaves)

    exact = of(F.linear_cross_entropy, wide)
    for found, torchs, value in zip(
        of(drop_in.linear_cross_entropy, leaves), of(F.linear_cross_entropy, leaves), exact, strict=True
    ):
        assert (found - value).abs().max() <= 1.5 * (torchs - value).abs().max() + 2**-8 * value.abs().max()
    assert of(drop_in.linear_cross_entropy, leaves)[0].dtype == torch.float32


@torch_has_it
def test_linear_cross_entropy_of_ignored_targets_alone_is_torchs_nan():
    leaves, targets = problem()
    del leaves["bias"]
    loss = drop_in.linear_cross_entropy(leaves["hidden"], leaves["weight"], targets.fill_(-100))
    wanted = with_gradients(F.linear_cross_entropy(leaves["hidden"], leaves["weight"], targets), leaves)
    torch.testing.assert_close(with_gradients(loss, leaves), wanted, equal_nan=True)
    assert loss.isnan()


@torch_has_it
def test_linear_cross_entropy_has_torchs_signature():
    assert defaults(drop_in.linear_cross_entropy) == defaults(F.linear_cross_entropy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", torch.ones(19)),
        ("label_smoothing", 0.1),
        ("reduction", "batchmean"),
        ("options", {"batch_chunk_size": 4}),
        ("target", torch.rand(11)),
        ("target", torch.zeros(11, 19, dtype=torch.int64)),
        ("linear_weight", torch.ones(19, 2, 6)),
        ("input", torch.ones(2, 11, 6)),
    ],
)
def test_linear_cross_entropy_refuses(name, value):
    leaves, targets = problem()
    arguments: dict = {"input": leaves["hidden"], "linear_weight": leaves["weight"], "target": targets} | {name: value}
    with pytest.raises(ValueError, match=rf"^linear_cross_entropy: .*\b{name}\b") as refused:
        drop_in.linear_cross_entropy(**arguments)
    assert "\n" not in str(refused.value)


@torch_has_it
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_chunk_size", 4),
        ("chunking_method", "aspect_ratio:2"),
        ("chunking_method", None),
        ("acc_policy", "compact"),
        ("acc_dtype", torch.float32),
    ],
)
def test_linear_cross_entropy_refuses_the_option(name, value):
    """Of float64 inputs sums are not made in float32."""
    leaves, targets = problem()
    other: dict = {"chunking_method": None} if name == "batch_chunk_size" else {}
    options = torch.nn.LinearCrossEntropyOptions(**{name: value} | other)
    with pytest.raises(ValueError, match=rf"^linear_cross_entropy: options\.{name} must be"):
        drop_in.linear_cross_entropy(leaves["hidden"], leaves["weight"], targets, ignore_index=IGNORED, options=options)


# ---- Liger


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_liger_is_its_formula(reduction, softcap, module):
    leaves, targets = problem()
    options = {"ignore_index": IGNORED, "reduction": reduction, "softcap": softcap}
    if module:
        loss = drop_in.LigerFusedLinearCrossEntropyLoss(**options)(
            leaves["weight"], leaves["hidden"], targets, leaves["bias"]
        )
    else:
        loss = drop_in.liger_fused_linear_cross_entropy(
            leaves["hidden"], leaves["weight"], targets, leaves["bias"], **options
        )
    logits = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)
    assert_equal(with_gradients(loss, leaves), with_gradients(wanted, leaves))


def test_liger_of_ignored_targets_alone_is_0():
    leaves, targets = problem()
    del leaves["bias"]
    loss = drop_in.liger_fused_linear_cross_entropy(leaves["hidden"], leaves["weight"], targets.fill_(-100))
    assert all(tensor.abs().max() == 0 for tensor in with_gradients(loss, leaves))


def test_liger_has_its_signature():
    required = dict.fromkeys(("input", "weight", "target"), inspect.Parameter.empty)
    wanted = required | {"bias": None} | LIGER | {"chunk_mem_const": 1}
    assert list(defaults(drop_in.liger_fused_linear_cross_entropy).items()) == list(wanted.items())
    assert list(defaults(drop_in.LigerFusedLinearCrossEntropyLoss).items()) == list(LIGER.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ce_weight", torch.ones(19)),
        ("lse_square_scale", 1e-4),
        ("label_smoothing", 0.1),
        ("reduction", "batchmean"),
        ("return_z_loss", True),
        ("accum_dtype", torch.bfloat16),
        ("use_token_scaling", True),
        ("return_token_accuracy", True),
        ("return_predicted_tokens", True),
        ("chunk_mem_const", 2),
        ("input", torch.ones(1, 11, 6)),
        ("target", torch.zeros(1, 11, dtype=torch.int64)),
    ],
)
def test_liger_refuses(name, value):
    leaves, targets = problem()
    arguments: dict = {"input": leaves["hidden"], "weight": leaves["weight"], "target": targets} | {name: value}
    with pytest.raises(ValueError, match=rf"^liger_fused_linear_cross_entropy: .*\b{name}\b") as refused:
        drop_in.liger_fused_linear_cross_entropy(**arguments)
    assert "\n" not in str(refused.value)


INTERPRETED = """
import inspect, torch
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Theirs
from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as theirs
from l3m_kernels.drop_in import LigerFusedLinearCrossEntropyLoss as Ours, liger_fused_linear_cross_entropy as ours
for a, b in ((theirs, ours), (Theirs, Ours)):
    a, b = ([(n, p.default) for n, p in inspect.signature(f).parameters.items()] for f in (a, b))
    assert a == b, (a, b)
torch.manual_seed(0)
leaves = [torch.randn(shape).requires_grad_() for shape in ((11, 6), (19, 6), (19,))]
target = torch.randint(19, (11,)); target[[0, 4]] = -100
for reduction in ("mean", "sum", "none"):
    found = []
    for function in (theirs, ours):
        loss = function(leaves[0], leaves[1], target, leaves[2], reduction=reduction)
        upstream = torch.linspace(-1, 2, 11) if reduction == "none" else torch.tensor(1.0)
        found.append([loss, *torch.autograd.grad(loss, leaves, upstream)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_is_liger_in_the_interpreter():
    """Without a softcap, which its kernel cannot have there."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "equal\n", done.stderr


# ---- TRL


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax_is_gathered(shape, columns, masked):
    leaves, arguments = _selected(shape, columns, masked)
    found = with_gradients(drop_in.selective_log_softmax(leaves["hidden"], leaves["weight"], **arguments), leaves)
    index, mask, temperature = arguments["index"], arguments["row_mask"], arguments["temperature"]
    logits = (leaves["hidden"] @ leaves["weight"].T + leaves["bias"]) / temperature
    wanted = logits.log_softmax(-1).gather(-1, index.view(*shape, columns or 1)).view(index.shape)
    wanted = wanted if mask is None else wanted.masked_fill(mask == 0, 0.0)
    assert_equal(found, with_gradients(wanted, leaves))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.filterwarnings("ignore")  # of TRL's imports
def test_selective_log_softmax_is_trls():
    from trl.trainer.utils import selective_log_softmax

    ours, theirs = (set(defaults(f)) for f in (drop_in.selective_log_softmax, selective_log_softmax))
    assert theirs - {"logits"} <= ours
    for columns in (None, 3):
        for masked in (False, True):
            leaves, arguments = _selected((2, 3), columns, masked)
            found = drop_in.selective_log_softmax(leaves["hidden"], leaves["weight"], **arguments)
            logits = leaves["hidden"] @ leaves["weight"].T + arguments.pop("bias")
            wanted = selective_log_softmax(logits, **arguments)
            assert_equal(with_gradients(found, leaves), with_gradients(wanted, leaves))


def _selected(shape: tuple[int, ...], columns: int | None, masked: bool) -> tuple[dict[str, Tensor], dict]:
    generator = torch.Generator().manual_seed(4)
    sizes = {"hidden": (*shape, 6), "weight": (19, 6), "bias": (19,)}
    leaves = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for name, size in sizes.items()
    }
    index = torch.randint(19, shape if columns is None else (*shape, columns), generator=generator)
    mask = None
    if masked:
        mask = torch.ones_like(index)
        mask.view(-1)[1::2] = 0
    return leaves, {"index": index, "temperature": 0.7, "row_mask": mask, "bias": leaves["bias"]}


def test_selective_log_softmax_of_a_softcap():
    leaves, arguments = _selected((5,), None, False)
    found = drop_in.selective_log_softmax(leaves["hidden"], leaves["weight"], softcap=1.5, **arguments)
    logits = 1.5 * torch.tanh((leaves["hidden"] @ leaves["weight"].T + leaves["bias"]) / 1.5) / 0.7
    wanted = logits.log_softmax(-1).gather(-1, arguments["index"][:, None])[:, 0]
    assert_equal(with_gradients(found, leaves), with_gradients(wanted, leaves))


@pytest.mark.parametrize("token", [-100, -1, 19])
def test_selective_log_softmax_ignores_no_index(token):
    leaves, arguments = _selected((5,), None, False)
    arguments["index"][2] = token
    with pytest.raises(IndexError, match=rf"targets\[2\] = {token} is outside"):
        drop_in.selective_log_softmax(leaves["hidden"], leaves["weight"], **arguments)


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 0), (5, 1, 1), ()], ids=str)
def test_selective_log_softmax_refuses_an_index_of_another_shape(shape):
    leaves, _ = _selected((5,), None, False)
    with pytest.raises(ValueError, match=r"^selective_log_softmax: index must be \(5,\)"):
        drop_in.selective_log_softmax(leaves["hidden"], leaves["weight"], torch.zeros(shape, dtype=torch.int64))


def test_selective_log_softmax_refuses_a_mask_of_another_shape():
    leaves, arguments = _selected((5,), 3, False)
    arguments["row_mask"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"^selective_log_softmax: row_mask must be \(5, 3\) like index"):
        drop_in.selective_log_softmax(leaves["hidden"], leaves["weight"], **arguments)
