"""Each wrong argument of the head's ops is a ValueError that names the op, the argument, what was wanted and what came."""

from typing import Any

import pytest
import torch

from l3m_kernels import drop_in, log_likelihood, weighted_log_likelihood
from l3m_kernels.checks import packed_batch, shorten

nan, infinity = float("nan"), float("inf")


def good(padded: bool) -> dict:
    shape = (2, 3) if padded else (6,)
    return {
        "hidden": torch.zeros(*shape, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(shape, dtype=torch.int64),
        "seq_weight": torch.ones(2),
        "cu_seqlens": None if padded else torch.tensor([0, 2, 6]),
    }


def call(op: str, arguments: dict) -> Any:
    if op == "log_likelihood":
        return log_likelihood(**{name: value for name, value in arguments.items() if name != "seq_weight"})
    return weighted_log_likelihood(**arguments)


PACKED = [
    # what is changed, and words of the message
    ({"temperature": 0.0}, ["temperature", "positive", "got 0.0"]),
    ({"temperature": -1.0}, ["temperature", "got -1.0"]),
    ({"temperature": nan}, ["temperature", "got nan"]),
    ({"temperature": infinity}, ["temperature", "got inf"]),
    ({"softcap": 0.0}, ["softcap", "positive", "None", "got 0.0"]),
    ({"softcap": -30.0}, ["softcap", "got -30.0"]),
    ({"softcap": nan}, ["softcap", "got nan"]),
    ({"softcap": infinity}, ["softcap", "got inf"]),
    *(
        (
            {name: value},
            [name, "a number, a constant", f"got shape {tuple(value.shape)}, requires_grad={value.requires_grad}"],
        )
        for name in ("temperature", "softcap")
        for value in (torch.tensor(0.7, requires_grad=True), torch.full((2,), 0.7))
    ),
    ({"hidden": torch.zeros(6, 4, dtype=torch.int64)}, ["hidden", "float32", "int64"]),
    ({"hidden": torch.zeros(6, 5)}, ["weight", "D = 5", "(7, 4)"]),
    ({"hidden": torch.zeros(5, 4)}, ["targets", "(5,)", "(6,)"]),
    ({"hidden": torch.zeros(2, 3, 4)}, ["hidden", "packed (T, D)", "(2, 3, 4)"]),
    ({"hidden": torch.zeros(6)}, ["hidden", "packed (T, D)", "(6,)"]),
    ({"cu_seqlens": None}, ["hidden", "padded (N, L, D)", "cu_seqlens", "(6, 4)"]),
    ({"weight": torch.zeros(7, 4, dtype=torch.int32)}, ["weight", "float32", "int32"]),
    ({"weight": torch.zeros(7, 4, dtype=torch.float64)}, ["weight", "float32", "float64", "autocast"]),
    ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, ["weight", "float32", "bfloat16"]),
    ({"weight": torch.zeros(7)}, ["weight", "(V, D)", "(7,)"]),
    ({"weight": torch.zeros(0, 4)}, ["weight", "V >= 1", "(0, 4)"]),
    ({"weight": torch.zeros(7, 3)}, ["weight", "D = 4", "(7, 3)"]),
    ({"weight": torch.zeros(7, 4, device="meta")}, ["weight", "device cpu", "meta"]),
    ({"bias": torch.zeros(6)}, ["bias", "(7,)", "(6,)"]),
    ({"bias": torch.zeros(7, 1)}, ["bias", "(7,)", "(7, 1)"]),
    ({"bias": torch.zeros(7, dtype=torch.float64)}, ["bias", "float32", "float64"]),
    ({"bias": torch.zeros(7, device="meta")}, ["bias", "device cpu", "meta"]),
    ({"targets": torch.zeros(6)}, ["targets", "int64", "float32"]),
    ({"targets": torch.zeros(6, dtype=torch.bool)}, ["targets", "int64", "bool"]),
    ({"targets": torch.zeros(5, dtype=torch.int64)}, ["targets", "(6,)", "(5,)"]),
    ({"targets": torch.zeros(2, 3, dtype=torch.int64)}, ["targets", "(6,)", "(2, 3)"]),
    ({"targets": torch.zeros(6, dtype=torch.int64, device="meta")}, ["targets", "device cpu", "meta"]),
    ({"cu_seqlens": torch.tensor([0, 3, 5])}, ["cu_seqlens", "T = 6", "[0, 3, 5]"]),
    ({"cu_seqlens": torch.tensor([0, 3, 7])}, ["cu_seqlens", "T = 6", "[0, 3, 7]"]),
    ({"cu_seqlens": torch.tensor([1, 3, 6])}, ["cu_seqlens", "start at 0", "[1, 3, 6]"]),
    ({"cu_seqlens": torch.tensor([0, 7, 6])}, ["cu_seqlens", "never decrease", "[0, 7, 6]"]),
    ({"cu_seqlens": torch.tensor([0, -1, 6])}, ["cu_seqlens", "never decrease"]),
    ({"cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32).flip(0)}, ["cu_seqlens", "[6, 4, 0]"]),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, ["cu_seqlens", "(N + 1,)", "(0,)"]),
    ({"cu_seqlens": torch.zeros(1, 3, dtype=torch.int64)}, ["cu_seqlens", "(N + 1,)", "(1, 3)"]),
    ({"cu_seqlens": torch.tensor([0.0, 2.0, 6.0])}, ["cu_seqlens", "int32 or int64", "float32"]),
]
PADDED = [
    ({"hidden": torch.zeros(2, 3, 1, 4)}, ["hidden", "padded (N, L, D)", "(2, 3, 1, 4)"]),
    ({"targets": torch.zeros(3, 2, dtype=torch.int64)}, ["targets", "(2, 3)", "(3, 2)"]),
    ({"targets": torch.zeros(6, dtype=torch.int64)}, ["targets", "(2, 3)", "(6,)"]),
]
WEIGHTED = [
    ({"seq_weight": torch.ones(3)}, ["seq_weight", "(2,)", "(3,)"]),
    ({"seq_weight": torch.ones(2, 1)}, ["seq_weight", "(2,)", "(2, 1)"]),
    ({"seq_weight": torch.ones(2, dtype=torch.int64)}, ["seq_weight", "floating", "int64"]),
    ({"seq_weight": torch.ones(2, device="meta")}, ["seq_weight", "device cpu", "meta"]),
    ({"seq_weight": torch.ones(2, requires_grad=True)}, ["seq_weight", "constant", "detach"]),
]
HEAD = ["log_likelihood", "weighted_log_likelihood"]
CASES = [
    *((op, False, change, words) for op in HEAD for change, words in PACKED),
    *((op, True, change, words) for op in HEAD for change, words in PADDED),
    *((HEAD[1], padded, change, words) for padded in (False, True) for change, words in WEIGHTED),
]


@pytest.mark.parametrize(("op", "padded", "change", "words"), CASES)
def test_wrong_argument_is_named(op, padded, change, words):
    call(op, good(padded))  # right before the change
    with pytest.raises(ValueError, match=f"^{op}: ") as error:
        call(op, good(padded) | change)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("op", HEAD)
@pytest.mark.parametrize("name", ["temperature", "softcap"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of which torch's forward mode is made
def test_a_number_may_be_a_tensor_but_what_is_learnt_would_have_no_gradient(op, name):
    arguments = good(False) | {"hidden": torch.ones(6, 4), "weight": torch.eye(7, 4)}
    found, wanted = (call(op, arguments | {name: value}) for value in (torch.tensor(0.5), 0.5))
    assert all(map(torch.equal, *((result if op == HEAD[0] else result[1]) for result in (found, wanted))))
    with pytest.raises(RuntimeError, match=f"^{op}: has no derivative in forward mode"):
        torch.func.jvp(lambda value: call(op, arguments | {name: value}), (torch.tensor(0.5),), (torch.tensor(1.0),))


LEARNT: Any = torch.tensor(0.7, requires_grad=True)
MATRIX, IDS = torch.ones(7, 4, requires_grad=True), torch.zeros(6, dtype=torch.int64)
DROP_INS = {
    "liger_fused_linear_cross_entropy": lambda rows, ids: drop_in.liger_fused_linear_cross_entropy(rows, MATRIX, ids),
    "linear_cross_entropy": lambda rows, ids: drop_in.linear_cross_entropy(rows, MATRIX, ids),
    "selective_log_softmax": lambda rows, ids: drop_in.selective_log_softmax(rows, MATRIX, ids),
}


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("temperature", lambda rows: drop_in.selective_log_softmax(rows, MATRIX, IDS, temperature=LEARNT)),
        ("softcap", lambda rows: drop_in.selective_log_softmax(rows, MATRIX, IDS, softcap=LEARNT)),
        ("softcap", lambda rows: drop_in.liger_fused_linear_cross_entropy(rows, MATRIX, IDS, softcap=LEARNT)),
        (
            "softcap",
            lambda rows: drop_in.LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=LEARNT)(MATRIX, rows, IDS),
        ),
    ],
)
def test_a_drop_in_learns_no_constant_either(name, function):
    with pytest.raises(ValueError, match=f"{name} must be a number, a constant, got .*requires_grad=True"):
        function(torch.ones(6, 4))


def jagged(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 6]))


@pytest.mark.parametrize("op", [*HEAD, *DROP_INS])
@pytest.mark.parametrize("argument", ["hidden", "targets", "both", "strided"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(op, argument):
    rows, ids = torch.ones(6, 4), IDS
    if argument in ("hidden", "both"):
        rows = jagged(rows)
    if argument in ("targets", "both"):
        ids = jagged(ids)
    if argument == "strided":
        rows = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(4, 4)])
    function = DROP_INS.get(op, lambda rows, ids: call(op, good(False) | {"hidden": rows, "targets": ids}))
    with pytest.raises(ValueError, match=rf"^{op}: \w+ must not be nested; pass .values\(\) of a jagged one"):
        function(rows, ids)


@pytest.mark.parametrize("op", HEAD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_on_the_meta_device_there_are_shapes_and_dtypes(op, dtype):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {name: None if t is None else t.to("meta") for name, t in good(True).items()}
    arguments["bias"] = torch.empty(7, device="meta")
    for name in ("hidden", "weight", "bias"):
        arguments[name] = arguments[name].to(dtype).requires_grad_()
    result = call(op, arguments)
    loss, found = (result.token.sum() + result.sequence.sum(), result) if op == HEAD[0] else result
    assert [(t.device.type, t.dtype, tuple(t.shape)) for t in (loss, *found)] == [
        ("meta", compute, ()),
        ("meta", compute, (2,)),
        ("meta", torch.int64, (2,)),
        ("meta", compute, (2, 3)),
    ]
    loss.backward()
    for name in ("hidden", "weight", "bias"):
        grad = arguments[name].grad
        assert (grad.device.type, grad.dtype, grad.shape) == ("meta", dtype, arguments[name].shape)


@pytest.mark.parametrize("op", HEAD)
def test_wrong_offsets_are_refused_before_anything_is_read(op):
    """An offset far outside must not be an access far outside."""
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(op, good(False) | {"cu_seqlens": torch.tensor([0, 2**40, 6])})


def test_long_lists_are_shortened():
    assert shorten(list(range(8))) == "[0, 1, 2, 3, 4, 5, 6, 7]"
    assert shorten(list(range(100))) == "[0, 1, 2, 3, ..., 97, 98, 99]"


def test_padded_batch_becomes_packed():
    arguments = good(True)
    targets = arguments["targets"].int()
    batch = packed_batch("op", arguments["hidden"], arguments["weight"], targets, None, None, None, 1.0)
    assert batch.hidden.shape == (6, 4)
    assert batch.targets.dtype == torch.int64
    assert batch.targets.shape == (6,)
    assert batch.cu_seqlens.tolist() == [0, 3, 6]
