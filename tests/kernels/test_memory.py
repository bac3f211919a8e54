"""No tensor of the logits' size is ever held: peak memory in a fresh process, with the op that holds them as the control."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from head_cases import HEAD_BACKENDS, WEIGHTED_BACKENDS

T, V, D = 1024, 16384, 16
LOGITS = T * V * 4  # 64 MiB
WORKSPACE = 8 << 20
# Beyond the workspace: hidden, its gradient, vectors of T, the weight's gradient and its accumulator (2 MiB), the heap's slack.
ALLOWED = WORKSPACE + (5 << 20)

PROGRAM = """
import json, os, sys
import torch
from l3m_kernels import log_likelihood, set_workspace, weighted_log_likelihood
from l3m_kernels.reference import eager_log_likelihood

torch.set_num_threads(1)


def resident(what):  # bytes: VmRSS now, VmHWM the most since the process was forked
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024


def run(op, tokens):
    hidden = (torch.randn(tokens, D) / 4).to(dtype).requires_grad_()
    weight = weights.requires_grad_(not frozen)
    targets, cu_seqlens = torch.arange(tokens) % V, torch.tensor([0, tokens // 3, tokens])
    if op == "eager":
        eager_log_likelihood(hidden, weight, targets).sum().backward()
    elif op[0] == "log_likelihood":
        log_likelihood(hidden, weight, targets, cu_seqlens, softcap=30.0, backend=op[1]).sequence.sum().backward()
    else:
        loss, _ = weighted_log_likelihood(
            hidden, weight, targets, torch.tensor([0.5, -1.0]), cu_seqlens, softcap=30.0, backend=op[1]
        )
        loss.backward()
    weight.grad = None


found = []
for ops, T, V, D, workspace, dtype, frozen in json.loads(sys.argv[1]):
    set_workspace(workspace)
    dtype = getattr(torch, dtype)
    weights = (torch.randn(V, D) / 4).to(dtype)
    found.append([])
    for op in ops:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # it has a high-water mark of its own
            run(op, 32)  # what is allocated once
            before = resident("VmRSS")
            run(op, T)
            os.write(write, str(resident("VmHWM") - before).encode())
            os._exit(0)
        os.close(write)
        found[-1].append(int(os.fdopen(read).read()))
        os.waitpid(child, 0)
print(json.dumps(found))
"""


def outputs(program: str, cases: list, **environment: str) -> list:
    """What a fresh process prints for each of the cases."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program, json.dumps(cases)]
    done = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
OPS = [["log_likelihood", name] for name in HEAD_BACKENDS] + [["weighted", name] for name in WEIGHTED_BACKENDS]
WIDE = (24, 32768, 512)  # tokens, vocabulary, width
CASES = {
    "float32": [[*OPS, "eager"], T, V, D, WORKSPACE, "float32", False],
    "bfloat16": [[*OPS, "eager"], T, V, D, WORKSPACE, "bfloat16", False],
    "wide": [OPS, *WIDE, WORKSPACE, "bfloat16", True],
}


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int]]:
    """By case, of each op."""
    # Freed blocks go back to the system at once: what is resident is what is held.
    return dict(zip(CASES, outputs(PROGRAM, list(CASES.values()), MALLOC_MMAP_THRESHOLD_="65536"), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_logits_are_held(peaks, dtype):
    *ours, control = peaks[dtype]
    assert control > LOGITS, "the control holds the logits, so the measurement sees them"
    for op, found in zip(OPS, ours, strict=True):
        assert found < ALLOWED < LOGITS / 4, (op, found)


def test_no_widened_weight_is_held(peaks):
    """bf16 weights are widened block by block: in fp32 these would be 64 MiB."""
    _, vocabulary, width = WIDE
    for op, found in zip(OPS, peaks["wide"], strict=True):
        assert found < ALLOWED < vocabulary * width * 4 / 4, (op, found)


CPP_PROGRAM = """
import json, os, sys
import torch
from l3m_kernels import release_workspace, set_workspace, weighted_log_likelihood


def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024


def run(dtype, low_memory, T, D, V):
    torch.set_num_threads(2)
    hidden = torch.randn(T, D).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(hidden.dtype).requires_grad_()
    targets, whole = torch.arange(T) % V, torch.tensor([0, T])
    set_workspace(None, low_memory=low_memory)
    few = torch.tensor([0, 64])
    weighted_log_likelihood(hidden[:64], weight[:512], targets[:64], torch.ones(1), few, backend="cpp")[0].backward()
    hidden.grad = weight.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again
    before = resident("VmRSS")
    weighted_log_likelihood(hidden, weight, targets, torch.ones(1), whole, backend="cpp")[0].backward()
    peak, after = resident("VmHWM"), resident("VmRSS")
    release_workspace()
    returned = hidden.grad.nbytes + weight.grad.nbytes
    return [peak - before - returned, after - before - returned, resident("VmRSS") - before - returned]


found = []
for case in json.loads(sys.argv[1]):
    read, write = os.pipe()
    child = os.fork()  # before any thread has been started
    if child == 0:
        os.write(write, json.dumps(run(*case)).encode())
        os._exit(0)
    os.close(write)
    found.append(json.loads(os.fdopen(read).read()))
    os.waitpid(child, 0)
print(json.dumps(found))
"""
ROWS, WIDTH, VOCABULARY = 1024, 512, 32000
ACCUMULATOR = 4 * VOCABULARY * WIDTH  # fp32, or exponentials of that size, where the weight has 16 bits
SLACK = 2 << 20  # of the heap
NATIVE = {
    ("bfloat16", False): (64 << 20) + ACCUMULATOR,
    ("bfloat16", True): 40 << 20,
    ("float16", False): (64 << 20) + ACCUMULATOR,
    ("float32", False): 64 << 20,
    ("float32", True): 40 << 20,
}


@pytest.fixture(scope="module")
def native() -> dict[tuple[str, bool], list[int]]:
    """By dtype and low_memory: bytes that are held at the peak, kept for the next call, and kept after a release."""
    return dict(zip(NATIVE, outputs(CPP_PROGRAM, [[*case, ROWS, WIDTH, VOCABULARY] for case in NATIVE]), strict=True))


@pytest.mark.skipif("cpp" not in HEAD_BACKENDS, reason="backend cpp is not built here")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(("dtype", "low_memory"), NATIVE)
def test_peak_memory_of_the_native_head(native, dtype, low_memory):
    """Beyond the returned gradients, in a fresh process; and what is kept for the next call, until it is released."""
    held, kept, released = native[dtype, low_memory]
    assert held < NATIVE[dtype, low_memory] + SLACK
    assert released < 16 << 20  # the heap's, of tiles
    if not low_memory:
        assert held > 16 << 20  # the exponentials that it keeps are seen
        assert kept - released > 16 << 20
