"""Where a call's time goes, kernel by kernel: shape R within several workspaces, by torch's profiler. `python bench/gpu_profile.py`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l3m_kernels import row_chunks, set_workspace, weighted_log_likelihood

WORKSPACES = (None, 1_050_000_000, 2_100_000_000, 4_400_000_000)  # the first one with and without gathering gradients
LEAST, MOST = 20.0, 9  # microseconds that a kernel takes to be told, and how many are


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    given = parser.parse_args()
    device, n, D, V = ("cpu", 64, 48, 320) if given.rehearse else ("cuda", 8192, 4096, 128256)
    backends, workspaces = (("cpp",), WORKSPACES[:1]) if given.rehearse else (("cuda", "triton"), WORKSPACES)
    hidden = torch.randn(n, D, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(V, D, device=device) / D**0.5).bfloat16().requires_grad_()
    targets, seq_weight = torch.randint(V, (n,), device=device), torch.randn(16, device=device)
    ends = torch.arange(0, n + 1, n // 16)
    gathers = row_chunks.gathered_rows
    for workspace, gathered in ((workspaces[0], False), *((each, True) for each in workspaces)):
        set_workspace(workspace)
        row_chunks.gathered_rows = gathers if gathered else lambda *_, **__: 0
        for backend in backends:

            def call() -> None:
                hidden.grad = weight.grad = None
                loss = weighted_log_likelihood(hidden, weight, targets, seq_weight, ends, scored=n, backend=backend)[0]  # noqa: B023
                loss.backward()

            for _ in range(3):
                call()
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
            with profile(activities=activities) as found:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
            clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
            kernels = sorted(found.key_averages(), key=lambda kernel: -getattr(kernel, clock))
            how = f"workspace {workspace or 'as it comes'}{'' if gathered else ', in chunks'}"
            print(f"{backend}, {how}: {sum(getattr(kernel, clock) for kernel in kernels) / 1e3:.2f} ms")
            for kernel in kernels[:MOST]:
                if (spent := getattr(kernel, clock)) >= LEAST:
                    print(f"  {spent / 1e3:8.3f} ms, {kernel.count:4} times  {kernel.key[:110]}", flush=True)


if __name__ == "__main__":
    main()
