"""The table of backends: what is picked, what is refused and why, and what the report says."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import l3m_kernels
from l3m_kernels import (
    Bounds,
    _native,
    barrier_weights,
    chunked,
    initial_state,
    log_likelihood,
    reference,
    set_workspace,
    weighted_log_likelihood,
)
from l3m_kernels import backends as backends_function
from l3m_kernels.backends import DEFAULT_WORKSPACE, TABLE, Backend, select, workspace

OPS = ("log_likelihood", "log_likelihood_backward", "part_backward", "weighted_log_likelihood", "barrier_weights")
DEVICE = torch.device("cuda", 0)
backends_module = sys.modules["l3m_kernels.backends"]
UNAVAILABLE = [row.name for row in TABLE if row.missing]


def call(op: str, backend: str | None):
    hidden, weight, targets = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 2])
    cu_seqlens = torch.tensor([0, 2])
    if op == "log_likelihood":
        return log_likelihood(hidden, weight, targets, cu_seqlens, backend=backend).sequence
    if op == "weighted_log_likelihood":
        return weighted_log_likelihood(hidden, weight, targets, torch.ones(1), cu_seqlens, backend=backend)[0]
    rewards = torch.ones(2, 1, dtype=torch.float64)
    return barrier_weights(rewards, initial_state(1), Bounds.of([]), 0.1, backend=backend).estimate


PUBLIC = [op for op in OPS if not op.endswith("_backward")]


@pytest.mark.parametrize("op", PUBLIC)
@pytest.mark.parametrize("name", UNAVAILABLE)
def test_unavailable_backend_says_why(op, name):
    reason = next(row.missing for row in TABLE if row.name == name) or ""
    with pytest.raises(RuntimeError) as error:
        call(op, name)
    assert all(words in str(error.value) for words in (op, repr(name), reason, "backend=None"))


@pytest.mark.parametrize("op", PUBLIC)
@pytest.mark.parametrize("name", ["tirton", ""])
def test_unknown_backend(op, name):
    with pytest.raises(ValueError, match=rf"{op}: backend must be one of cuda, triton, cpp, reference .*got '{name}'"):
        call(op, name)


@pytest.mark.parametrize("op", PUBLIC)
def test_automatic_choice_equals_the_named_one(op):
    first = next(row.name for row in TABLE if row.problem(op, "cpu") is None)
    assert torch.equal(call(op, None), call(op, first))
    assert torch.equal(call(op, None), call(op, "reference"))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_reference_has_every_op_on_every_device(device):
    assert TABLE[-1].name == "reference"
    assert tuple(TABLE[-1].ops) == OPS
    for op in OPS:
        assert TABLE[-1].problem(op, device) is None
        assert select(op, "auto", device) is not None
    assert select("log_likelihood", "reference", device) is chunked.log_likelihood
    assert select("barrier_weights", "reference", device) is reference.barrier_weights


def test_order_devices_and_missing_ops(monkeypatch):
    """auto takes the first row that can; each reason is told apart."""

    def fast():
        raise AssertionError

    rows = (
        replace(TABLE[0], missing=None, ops={"log_likelihood": fast}),
        Backend("cpp", ("cpu",), {"barrier_weights": fast}),
        TABLE[-1],
    )
    monkeypatch.setitem(select.__globals__, "TABLE", rows)
    assert select("log_likelihood", "auto", "cuda") is fast
    assert select("log_likelihood", "auto", "cpu") is chunked.log_likelihood
    assert select("barrier_weights", "auto", "cpu") is fast
    with pytest.raises(RuntimeError, match="'cuda' cannot be used: runs on cuda, not on cpu"):
        select("log_likelihood", "cuda", "cpu")
    with pytest.raises(
        RuntimeError, match=r"'cpp' cannot be used: does not implement log_likelihood \(it has: barrier_weights\)"
    ):
        select("log_likelihood", "cpp", "cpu")


def test_report():
    report = backends_function()
    assert report.torch == torch.__version__
    assert report.devices[0] == "cpu"
    text = str(report)
    for row in TABLE:
        line = next(line for line in text.splitlines() if line.split()[0] == row.name)
        assert (f"not available: {row.missing}" if row.missing else f"available: {', '.join(row.ops)}") in line
    for op in OPS:
        chosen = next(row.name for row in TABLE if row.problem(op, "cpu") is None)
        assert f"{op}: {chosen} on cpu" in text


def test_report_from_the_command_line():
    root = Path(l3m_kernels.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "l3m_kernels"], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"l3m_kernels {l3m_kernels.__version__}\ntorch {torch.__version__}, Python ")
    assert str(backends_function()) in done.stdout


@pytest.mark.parametrize(
    "size", [0, -1, -(1 << 30), 0.5, 1e9 + 0.5, -2.0, 1e300, float("nan"), float("inf"), True, "1000"]
)
def test_workspace_must_be_a_positive_whole_number(size):
    wanted = f"^set_workspace: bytes must be a positive whole number or None, got {re.escape(repr(size))}"
    with pytest.raises(ValueError, match=wanted):
        set_workspace(size)
    assert workspace("cpu") == DEFAULT_WORKSPACE


def test_workspace_is_set_and_restored():
    set_workspace(12345)
    assert workspace("cpu") == workspace("cuda") == workspace("cpu", 151936) == 12345
    set_workspace(2**30 / 2)
    assert (workspace("cpu"), type(workspace("cpu"))) == (2**29, int)
    assert call("log_likelihood", None) < 0
    set_workspace(None)
    assert (workspace("cpu"), workspace("cuda"), workspace("xpu")) == (64 << 20, 512 << 20, 512 << 20)
    assert (workspace("cpu", 32000), workspace("cpu", 128256)) == (64 << 20, 384 * 4 * 128256)
    assert (workspace("cuda", 32000), workspace("cuda", 151936)) == (512 << 20, 1024 * 4 * 151936)
    assert workspace("cuda", 151936, 1024, 2) == 1024 * (4 * 151936 + 1024 * (2 + 4))  # rows with what they hold


@pytest.mark.parametrize("size", [1, 5000, 40_000])
def test_workspace_bounds_the_chunks(size, monkeypatch):
    """No buffer of logits that the reference makes is larger, but for one row."""
    seen = []
    original = torch.empty

    def empty(*shape, **options):
        tensor = original(*shape, **options)
        seen.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(chunked.torch, "empty", empty)
    set_workspace(size)
    vocabulary = 500
    log_likelihood(
        torch.randn(50, 4), torch.randn(vocabulary, 4), torch.arange(50), torch.tensor([0, 50]), backend="reference"
    )
    assert max(seen) <= max(size, 4 * vocabulary)
    assert sum(seen) == 50 * vocabulary * 4


def test_every_public_name_is_exported_once():
    assert len(set(l3m_kernels.__all__)) == len(l3m_kernels.__all__)
    assert all(hasattr(l3m_kernels, name) for name in l3m_kernels.__all__)


# ---- GPUs that a backend does not run on


@pytest.fixture
def gpu(monkeypatch):
    """Plays GPUs of some compute capabilities, and backends that are there."""

    def play(*capabilities: tuple[int, int], architectures=("80-real", "90-real", "120-virtual")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capabilities[index or 0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"GPU {index or 0}")
        native = _native.NativeStatus(None, "", None, architectures)
        monkeypatch.setattr(backends_module, "NATIVE", native)
        table = (
            Backend("cuda", ("cuda",), {"op": lambda: "cuda"}, cannot_run_on=backends_module._not_compiled),
            Backend("triton", ("cuda",), {"op": lambda: "triton"}, cannot_run_on=backends_module._too_old),
            Backend("reference", ("*",), {"op": lambda: "reference"}),
        )
        monkeypatch.setattr(backends_module, "TABLE", table)

    return play


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_that_is_too_old_is_refused_by_name_and_auto_does_without(gpu, backend):
    gpu((7, 5))
    with pytest.raises(
        RuntimeError, match=r"op: backend .* needs a GPU of compute capability 8.0 or newer; GPU 0 has 7.5"
    ):
        select("op", backend, "cuda")
    assert select("op", "auto", "cuda")() == "reference"


def test_it_is_the_tensors_gpu_that_counts(gpu):
    gpu((7, 5), (9, 0))
    assert select("op", "auto", "cuda", index=1)() == "cuda"
    assert select("op", "auto", "cuda", index=0)() == "reference"


def test_a_gpu_that_the_build_has_no_code_for(gpu):
    gpu((8, 6), architectures=("90-real",))
    wanted = r"compiled for compute capabilities 90-real \(TORCH_CUDA_ARCH_LIST at build time says for which\); GPU 0 has 8.6"
    with pytest.raises(RuntimeError, match=wanted):
        select("op", "cuda", "cuda")
    assert select("op", "auto", "cuda")() == "triton"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("80-real",), (8, 0), True),
        (("80-real",), (8, 9), True),
        (("86-real",), (8, 0), False),
        (("80-real",), (9, 0), False),
        (("80-virtual",), (9, 0), True),
        (("120-virtual",), (10, 0), False),
        (("90a-real",), (9, 0), True),
        (("90a-virtual",), (10, 0), False),
        (("100f-real",), (10, 3), True),
        (("100a-real",), (10, 3), False),
        ((), (9, 0), False),
    ],
)
def test_which_machine_code_a_gpu_has(architectures, capability, runs):
    assert _native.runs_on(architectures, capability) == runs


def test_the_kernel_that_scales_is_that_of_the_backend_that_runs(monkeypatch):
    def scale(values: torch.Tensor, factor: torch.Tensor) -> None: ...

    for backend in ("auto", "reference"):
        assert backends_module.scale_in_place("op", backend, torch.device("meta")) is None
    table = [Backend("cuda", ("cuda",), {"op": min}, scale=scale), Backend("reference", ("*",), {"op": min})]
    monkeypatch.setattr(backends_module, "TABLE", table)
    found = {
        backend: backends_module.scale_in_place("op", backend, DEVICE) for backend in ("auto", "cuda", "reference")
    }
    assert found == {"auto": scale, "cuda": scale, "reference": None}
    table[0] = replace(table[0], missing="not built")
    assert backends_module.scale_in_place("op", "auto", DEVICE) is None
