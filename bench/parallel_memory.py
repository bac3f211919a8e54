"""Memory per rank of the vocabulary-parallel head on gloo ranks of this machine, against one process.

python bench/parallel_memory.py [--shape n,D,V] [--dtype bfloat16] [--ranks 1,2,4] [--frozen] prints a table: what a rank has resident for
its rows of the weight, and at most with them in a step, which is `log_likelihood` and its backward. Linux.
"""

import argparse
import contextlib
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import l3m_kernels
from l3m_kernels import parallel


def resident(what: str) -> float:
    """MiB: VmRSS now, VmHWM at most since the last `forget`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) / 1024


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def step(rank: int, ranks: int, shape: tuple[int, int, int], dtype: torch.dtype, frozen: bool) -> tuple[float, ...]:
    """-> MiB of the weight's rows, MiB at most in a step."""
    tokens, width, vocabulary = shape
    chunk = -(-vocabulary // ranks)
    rows = max(min(chunk, vocabulary - rank * chunk), 0)
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    targets, offsets = torch.arange(tokens) * 7919 % vocabulary, torch.tensor([0, tokens])
    run = l3m_kernels.log_likelihood if ranks == 1 else parallel.log_likelihood
    run(
        hidden[:1], torch.zeros(1, width, dtype=dtype), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1])
    )  # what is allocated once
    before = resident("VmRSS")
    weight = torch.empty(rows, width, dtype=dtype)
    weight.normal_(0.0, 0.02).requires_grad_(not frozen)
    held = resident("VmRSS") - before
    forget()
    run(hidden, weight, targets, offsets).sequence.sum().backward()
    return held, resident("VmHWM") - before


def measure(ranks: int, *settings) -> list[float]:
    """The largest of the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            if child := os.fork():
                children.append(child)
                continue
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
                found = torch.tensor(step(rank, ranks, *settings))
                dist.all_reduce(found, op=dist.ReduceOp.MAX)
                torch.save(found, f"{folder}/{rank}.pt")
                dist.barrier()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        for _ in children:
            _, status = os.wait()
            if status:
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, 9)
                raise SystemExit(f"a rank of {ranks} failed")
        return torch.load(f"{folder}/0.pt").tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="64,2048,128256", help="n,D,V")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--frozen", action="store_true", help="no gradient of the weight")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = tuple(map(int, given.shape.split(",")))
    print("| ranks | weight, MiB | at most in a step, MiB |\n|---|---|---|", flush=True)
    for ranks in map(int, given.ranks.split(",")):
        held, peak = measure(ranks, shape, getattr(torch, given.dtype), given.frozen)
        print(f"| {ranks} | {held:.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
