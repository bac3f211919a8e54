"""The row kernels alone, by size of the vocabulary: what `auto` chooses by (csrc/cuda/softmax_gradient.cu). `python bench/gpu_rows.py`"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from gpu_steps import timed  # noqa: E402

from l3m_kernels.chunk_sizes import row_stride  # noqa: E402

VOCABULARIES, ROWS, ROUNDS = (32000, 65536, 128256, 152064, 256000), 1024, 7


def main() -> None:
    from l3m_kernels.triton_ops import softmax_gradient  # registers our ops too

    kernels = dict.fromkeys(("two_pass", "cluster"), torch.ops.l3m_kernels.cuda_softmax_gradient)
    for vocabulary in VOCABULARIES:
        normal = torch.randn(ROWS, row_stride(vocabulary), device="cuda")
        buffer, elsewhere = normal.clone(), torch.empty_like(normal, dtype=torch.bfloat16)[:, :vocabulary]
        targets = torch.randint(vocabulary, (ROWS,), device="cuda")
        upstream, flag = torch.randn(ROWS, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
        token, lse = (torch.empty(ROWS, device="cuda") for _ in range(2))
        for name, kernel in (kernels | {"triton": softmax_gradient}).items():
            os.environ["L3M_ROW_KERNEL"] = name if name in kernels else "auto"
            found = []
            for given, out in ((None, None), (upstream, None), (upstream, elsewhere)):
                settings = (given, None, 0.0, 1.0, torch.bfloat16)  # no bias, no softcap, temperature 1
                arguments = (buffer[:, :vocabulary], targets, *settings, token, lse, flag, False, out)
                seconds = timed(lambda: kernel(*arguments), "cuda", ROUNDS, lambda: buffer.copy_(normal))  # noqa: B023
                found.append(statistics.median(seconds) * 1e3)
            shown = "  ".join(
                f"{what} {ms:.3f}" for what, ms in zip(("forward", "in place", "elsewhere"), found, strict=True)
            )
            print(f"V={vocabulary} {name:9} {shown} ms", flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_rows: needs a CUDA device")
    main()
