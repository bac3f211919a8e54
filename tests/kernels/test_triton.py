"""The Triton backend without a GPU: its kernels in Triton's interpreter and compiled for each architecture, in processes of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
# Of each file what is wanted in the interpreter; what is slow there, and the same for every backend, is in `make test-full`.
SUITES = {
    "kernels": {
        "test_triton_fuzz": "",
        "test_triton_small": "",
        "test_offsets": "triton",
        "test_row_chunks": "gathered and triton and counted and (dtype0-True-True or dtype1-False-False)",
        "test_ops_hazards": "triton and (not infinite or dtype1-None-weighted or dtype2-4.0-log_likelihood)",
        "test_ops_compile": "triton and (fullgraph_with or scaler or autocast) and not float64",
    },
    "ops": {
        "test_triton_kernels": "not (outside and 12345.0)",
        "test_ops_shapes": "triton and not long_sums and not large_batch and not beyond and not biased",  # few rows
        "test_ops_autograd": "triton and not gradcheck and not same_bits",
        "test_saved_tensors": "triton and (hooks or seen_statistics or region_that_goes_on or (second_backward and rebuilt))",
        "test_scored_count": "triton and not fullgraph",
        "test_barrier_weights_edges": "triton and not opcheck and not (constant_rewards and (3333 or 1e-30 or 1000000))",
    },
}
REST = {
    "test_triton_fuzz": "",
    "test_triton_kernels": "",
    "test_barrier_weights_edges": "triton",
    "test_ops_autograd": "triton and same_bits",
    "test_saved_tensors": "triton and not bfloat16 and not compiled",
    "test_row_chunks": "gathered and triton",
    "test_ops_hazards": "infinite and triton",
    "test_scored_count": "triton and fullgraph",
}


def interpreted(suite: dict[str, str], *options: str) -> str:
    """Run tests where Triton's kernels run in its interpreter, in one process -> the last line that pytest printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    # xdist's workers inherit what names them, and would take this process for one of theirs
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    wanted = [f"({file}.py and ({tests}))" if tests else f"{file}.py" for file, tests in suite.items()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-k",
        " or ".join(wanted),
    ]
    command += [*options, *(str(Path(__file__).parent / f"{file}.py") for file in suite)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout.strip().splitlines()[-1]


def passed(last: str) -> int:
    found = re.search(r"(\d+) passed", last)
    assert found is not None, last
    return int(found[1])


@pytest.mark.parametrize(("suite", "least"), [("kernels", 235), ("ops", 330)])
def test_in_the_interpreter(suite, least):
    assert passed(interpreted(SUITES[suite])) >= least


@pytest.mark.slow
def test_the_rest_in_the_interpreter():
    """Random calls, and what is left out above."""
    assert passed(interpreted(REST, "-m", "slow or not slow")) >= 1500


def ahead(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "l3m_kernels.triton_ops", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, cwd=ROOT)


@pytest.mark.parametrize("architectures", [(90, 120), pytest.param((80, 100), marks=pytest.mark.slow)], ids=str)
def test_compiles_ahead_of_time_for_every_architecture(architectures):
    """The main variant of each kernel and configuration: no spills, shared memory within the limit."""
    done = ahead("--main", "--arch", *map(str, architectures))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for architecture in architectures:
        for kernel in ("softmax_gradient", "sequence_sums", "barrier_weights", "product", "scale"):
            assert re.search(rf"│ {kernel} .*│ +{architecture} │", done.stdout), (kernel, architecture)
    assert re.search(r"(\d+) compiled, 0 with a problem", done.stdout)


@pytest.mark.slow
def test_every_variant_compiles_ahead_of_time():
    done = ahead()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_spills_and_too_much_shared_memory_are_problems():
    from l3m_kernels.triton_ops.ahead import ARCHITECTURES, Compiled, variants

    variant = next(variants())
    assert Compiled(variant, 90, 64, 0, ARCHITECTURES[90]).problem is None
    assert "spills 8 bytes" in str(Compiled(variant, 90, 255, 8, 0).problem)
    assert "shared memory" in str(Compiled(variant, 120, 64, 0, ARCHITECTURES[120] + 1).problem)


@pytest.mark.parametrize("kernel", ["sequence_sums", "product", "scale"])
def test_offsets_into_what_may_be_large_have_64_bits(kernel):
    """In what the compiler makes: tokens, matrices and gradients may have 2^31 elements. Those in 32 bits are none of these."""
    from l3m_kernels.triton_ops.ahead import compile_kernel, variants

    variant = next(variant for variant in variants() if variant.kernel == kernel)
    text = compile_kernel(variant, 90).asm["ttir"]
    of_blocks = re.findall(r"tt\.addptr .* : tensor<[\dx]*!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", text)
    assert of_blocks
    assert set(of_blocks) == {"i64"}


def report(environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "l3m_kernels"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT).stdout


def test_report_says_why_there_is_no_triton_here_or_that_there_is():
    interpreted = report({**os.environ, "TRITON_INTERPRET": "1"})
    assert re.search(r"triton +cuda, cpu +available: log_likelihood, .*barrier_weights", interpreted)
    assert not re.search(r": triton on cpu", interpreted)  # asked for by name only
    if not torch.cuda.is_available():
        compiled = report({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})
        assert re.search(r"triton +cuda +not available: no CUDA device here", compiled)
