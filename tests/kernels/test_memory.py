"""No tensor of the logits' size is ever held: peak memory in a fresh process, with the op that holds them as the control."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from head_cases import HEAD_BACKENDS, WEIGHTED_BACKENDS

T, V, D = 2048, 16384, 16
LOGITS = T * V * 4  # 128 MiB
WORKSPACE = 8 << 20
# Beyond the workspace: hidden, its gradient, vectors of T, the weight's gradient and its accumulator (2 MiB), the heap's slack.
ALLOWED = WORKSPACE + (5 << 20)

PROGRAM = """
import json, os, sys
import torch
from l3m_kernels import log_likelihood, set_workspace, weighted_log_likelihood
from l3m_kernels.reference import eager_log_likelihood

torch.set_num_threads(1)
ops, T, V, D, workspace, dtype, frozen = json.loads(sys.argv[1])
set_workspace(workspace)
dtype = getattr(torch, dtype)


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


weights = (torch.randn(V, D) / 4).to(dtype)
found = []
for op in ops:
    read, write = os.pipe()
    if os.fork() == 0:  # a child has a high-water mark of its own
        run(op, 32)  # what is allocated once
        before = resident("VmRSS")
        run(op, T)
        os.write(write, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    found.append(int(os.fdopen(read).read()))
print(json.dumps(found))
"""


def peaks(ops: list, *settings) -> list[int]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", PROGRAM, json.dumps([ops, *settings])]
    # Freed blocks go back to the system at once: what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
OPS = [["log_likelihood", name] for name in HEAD_BACKENDS] + [["weighted", name] for name in WEIGHTED_BACKENDS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_logits_are_held(dtype):
    *ours, control = peaks([*OPS, "eager"], T, V, D, WORKSPACE, dtype, False)
    assert control > LOGITS, "the control holds the logits, so the measurement sees them"
    for op, found in zip(OPS, ours, strict=True):
        assert found < ALLOWED < LOGITS / 8, (op, found)


def test_no_widened_weight_is_held():
    """bf16 weights are widened block by block: in fp32 these would be 64 MiB."""
    vocabulary, width, tokens = 32768, 512, 24
    for op, found in zip(OPS, peaks(OPS, tokens, vocabulary, width, WORKSPACE, "bfloat16", True), strict=True):
        assert found < ALLOWED < vocabulary * width * 4 / 4, (op, found)


CPP_PROGRAM = """
import json, sys
import torch
from l3m_kernels import release_workspace, set_workspace, weighted_log_likelihood

torch.set_num_threads(2)
dtype, low_memory, T, D, V = json.loads(sys.argv[1])


def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024


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
print(json.dumps([peak - before - returned, after - before - returned, resident("VmRSS") - before - returned]))
"""
ROWS, WIDTH, VOCABULARY = 2048, 1024, 32000
ACCUMULATOR = 4 * VOCABULARY * WIDTH  # fp32, or exponentials of that size, where the weight has 16 bits
SLACK = 2 << 20  # of the heap


@pytest.mark.skipif("cpp" not in HEAD_BACKENDS, reason="backend cpp is not built here")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(
    ("dtype", "low_memory", "allowed"),
    [
        ("bfloat16", False, (64 << 20) + ACCUMULATOR),
        ("bfloat16", True, 40 << 20),
        ("float16", False, (64 << 20) + ACCUMULATOR),
        ("float32", False, 64 << 20),
        ("float32", True, 40 << 20),
    ],
)
def test_peak_memory_of_the_native_head(dtype, low_memory, allowed):
    """Beyond the returned gradients, in a fresh process; and what is kept for the next call, until it is released."""
    arguments = json.dumps([dtype, low_memory, ROWS, WIDTH, VOCABULARY])
    command = [sys.executable, "-c", CPP_PROGRAM, arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    held, kept, released = json.loads(done.stdout)
    assert held < allowed + SLACK
    assert released < 16 << 20  # the heap's, of tiles
    if not low_memory:
        assert held > 16 << 20  # the exponentials that it keeps are seen
        assert kept - released > 16 << 20
