"""What the steps of `gpu_run.py` measure, each in a process of its own: `python bench/gpu_steps.py products --output FOLDER`.

What is found goes to standard output, a line of JSON each, and `gpu_run.py` keeps it. `versions` and `products` need torch alone: the
package may be being built beside them. Letters: m rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MARK = "@record "
PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")
WANTED = ("torch", "triton", *PEERS, "pydantic", "transformers", "setuptools")
ROWS, WIDTH, VOCABULARY = (
    (512, 768, 1024, 1536, 2048, 4096, 8192),
    4096,
    128256,
)  # of shape R, and the chunks it may be cut into
WORKSPACES = (512 << 20, 600_000_000, 1_050_000_000, 2_100_000_000)
ROUNDS = 7
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative errors of gradients, as tests/gpu has them
HALF = 0.5  # of the time that is left, that a case of the race may take: who compiles itself has it in the first ones
UNUSABLE = 70  # exit code: the device answers with errors


def record(**values: Any) -> None:
    print(MARK + json.dumps(values), flush=True)


def timed(
    run: Callable[[], object], device: str, rounds: int, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each call after two that are not counted; on a GPU by events, after its cache was filled with something else."""
    flush = torch.empty(256 << 20 if device == "cuda" else 0, dtype=torch.uint8, device=device)
    found = []
    for index in range(rounds + 2):
        before()
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(8):  # a millisecond, in which the host gets ahead
                flush.zero_()
            start.record()  # pyright: ignore[reportCallIssue]
            run()
            end.record()  # pyright: ignore[reportCallIssue]
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begun = time.perf_counter()
            run()
            seconds = time.perf_counter() - begun
        found += [seconds] if index >= 2 else []
    return found


# ---- with torch alone ------------------------------------------------------------------------------------------------


def _said(program: str, *options: str) -> str:
    """The last line of what a program says."""
    if shutil.which(program) is None:
        return "not on PATH"
    said = subprocess.run([program, *options], capture_output=True, text=True, timeout=10).stdout.split("\n")
    return next((line.strip() for line in reversed(said) if line.strip()), "nothing")


def versions(given: argparse.Namespace) -> int:
    packages = {}
    for name in WANTED:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    found: dict[str, Any] = {"python": platform.python_version(), **packages, "cuda": torch.version.cuda}
    found["nvcc"] = _said("nvcc", "--version")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["capability"] = f"{properties.major}.{properties.minor}"
        query = "driver_version,clocks.sm,clocks.mem,memory.total"
        found["driver and clocks"] = _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    elif not given.rehearse:
        found["stop"] = "torch finds no CUDA device here; --rehearse does without"
    record(**found)
    for name, value in found.items():
        print(f"{name:18} {value}")
    if (major := packages["setuptools"].partition(".")[0]).isdigit() and not 77 <= int(major) < 82:
        print(f"setuptools {major} is outside 77 to 81: where the build fails, carry a wheel of one that is not")
    return int("stop" in found)


def products(given: argparse.Namespace) -> int:
    """NT, NN and TN alone, for each number of rows; a GPU writes fp32 from 16-bit operands, as the head does."""
    device, sizes, D, V = ("cpu", (32, 64), 48, 320) if given.rehearse else ("cuda", ROWS, WIDTH, VOCABULARY)

    def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        if device == "cpu":
            out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=int(add))
        elif out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        elif add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)  # pyright: ignore[reportCallIssue]
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    def empty(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(rows, columns, device=device, dtype=dtype)

    weight, d_weight, d_half = normal(V, D), empty(V, D), empty(V, D, torch.bfloat16)
    for m in sizes:
        hidden, gradient = normal(m, D), normal(m, V)
        forms: dict[str, tuple[Tensor, Tensor, Tensor, bool]] = {
            "NT": (hidden, weight.t(), empty(m, V), False),
            "NN": (gradient, weight, empty(m, D), False),
            "NN in 16 bits": (gradient, weight, empty(m, D, torch.bfloat16), False),
            "TN, beta 0": (gradient.t(), hidden, d_weight, False),
            "TN, beta 1": (gradient.t(), hidden, d_weight, True),
            "TN in 16 bits": (gradient.t(), hidden, d_half, False),
        }
        for form, (a, b, out, add) in forms.items():
            title, flops = f"{form}, m={m}", 2.0 * m * D * V
            try:
                seconds = timed(lambda: product(a, b, out, add), device, ROUNDS)  # noqa: B023
            except (RuntimeError, TypeError) as error:  # a form that this torch does not have
                record(group="products", title=title, reason=" ".join(str(error).split())[:160])
            else:
                record(group="products", title=title, seconds=seconds, flops=flops)
        del hidden, gradient, forms
        gc.collect()
    return 0


# ---- with the package ------------------------------------------------------------------------------------------------


def _backends(given: argparse.Namespace) -> tuple[str, ...]:
    return ("cpp", "triton") if given.rehearse else ("cuda", "triton")


def smoke(given: argparse.Namespace) -> int:
    """One chunk of rows and three, both backends, against the reference in float64."""
    from l3m_kernels import set_workspace, weighted_log_likelihood
    from l3m_kernels.chunk_sizes import row_bytes

    device, rows, D, V = ("cpu", 24, 16, 100) if given.rehearse else ("cuda", 600, 128, 5000)
    generator, wrong = torch.Generator().manual_seed(0), False
    ends = torch.arange(0, rows + 1, rows // 4, device=device)
    for dtype, chunks in ((dtype, chunks) for dtype in ALLOWED for chunks in (1, 3)):
        hidden = torch.randn(rows, D, generator=generator).to(device, dtype)
        weight = (torch.randn(V, D, generator=generator) / D**0.5).to(device, dtype)
        targets = torch.randint(V, (rows,), generator=generator).to(device)
        targets[::5] = -100
        scored, seq_weight = int((targets >= 0).sum()), torch.randn(4, generator=generator).to(device)

        def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = tuple(tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))  # noqa: B023
            batch = (leaves[0], leaves[1], targets, seq_weight.to(dtype), ends)  # noqa: B023
            loss, _ = weighted_log_likelihood(*batch, backend=backend)
            return (loss.detach(), *torch.autograd.grad(loss, leaves))

        exact = gradients("reference", torch.float64)
        for backend in _backends(given):
            title = f"{backend}, {str(dtype)[6:]}, {chunks} chunk{'s' * (chunks > 1)}"
            set_workspace(row_bytes(V, D, hidden.itemsize) * -(-scored // chunks))
            try:
                found = gradients(backend, dtype)
                pairs = zip(found, exact, strict=True)
                errors = [float((mine.double() - right).norm() / right.norm()) for mine, right in pairs]
            except Exception as error:
                wrong = True
                record(smoke=title, reason=f"{type(error).__name__}: {error}"[:200])
                print(f"{title}: {type(error).__name__}: {error}")
                continue
            finally:
                set_workspace(None)
            good = all(error <= ALLOWED[dtype] for error in errors)  # a NaN is not
            wrong |= not good
            record(smoke=title, errors=errors, good=good)
            shown = ", ".join(f"{error:.1e}" for error in errors)
            print(f"{title}: {'right' if good else 'WRONG'}, errors of loss, d_hidden, d_weight {shown}")
    return int(wrong)


def row_kernel(given: argparse.Namespace) -> int:
    """The pass between the products, alone: GB/s of what it moves. The kernel is the one that L3M_ROW_KERNEL asks for."""
    importlib.import_module("l3m_kernels")  # registers its ops
    device, m, V = ("cpu", 2, 300) if given.rehearse else ("cuda", 1024, VOCABULARY)
    once = os.environ.get("L3M_ROW_KERNEL") == "cluster"
    normal = torch.randn(m, -(-V // 32) * 32, device=device)
    buffer, targets = normal.clone(), torch.randint(V, (m,), device=device)
    upstream, flag = torch.randn(m, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    token, lse = (torch.empty(m, device=device) for _ in range(2))
    failed = False
    for name in ("triton",) if given.rehearse else ("cuda",) if once else ("cuda", "triton"):
        for form, known in (("forward", False), ("forward and gradient", False), ("gradient, lse known", True)):
            title = f"{name}, {form}{', one reading' if once else ''}"
            readings = 1 if once or known or form == "forward" else 2
            moved = (4 * readings + (0 if form == "forward" else 2)) * m * V
            try:
                if name == "triton":
                    from l3m_kernels.triton_ops import softmax_gradient as kernel
                else:
                    kernel = torch.ops.l3m_kernels.cuda_softmax_gradient
                settings = (None, 0.0, 1.0, torch.bfloat16)  # no bias, no softcap, temperature 1
                rows = (buffer[:, :V], targets, None if form == "forward" else upstream)
                arguments = (*rows, *settings, None if known else token, lse, flag, known)
                seconds = timed(lambda: kernel(*arguments), device, given.rounds, lambda: buffer.copy_(normal))  # noqa: B023
            except Exception as error:
                failed = True
                record(group="row kernel", title=title, reason=f"{type(error).__name__}: {error}"[:200])
            else:
                record(group="row kernel", title=title, seconds=seconds, bytes=float(moved))
    return int(failed)


def _cases(given: argparse.Namespace) -> tuple[Any, ...]:
    from l3ms.benchmark.shapes import GPU_FULL, TINY, Case

    return tuple(Case("weighted", TINY, "bf16", masked) for masked in (0.0, 0.4)) if given.rehearse else GPU_FULL


def workspaces(given: argparse.Namespace) -> int:
    from dataclasses import asdict

    from l3ms.benchmark.parts import over_workspaces

    sizes = (1 << 16, 1 << 20) if given.rehearse else WORKSPACES
    case, name, rounds = _cases(given)[0], _backends(given)[0], 2 if given.rehearse else ROUNDS
    failed = False
    for kernel in given.row_kernels.split(","):
        os.environ["L3M_ROW_KERNEL"] = kernel  # which the native part asks for at each call
        for part in over_workspaces(sizes, case, name, rounds, 0):
            failed |= part.reason is not None
            part.title += f", {kernel}"
            record(**asdict(part))
    return int(failed)


def race(given: argparse.Namespace) -> int:
    """The cases from `--first` on; those `--without` are listed with their reasons."""
    from l3ms.benchmark import parts, tables
    from l3ms.benchmark.contestants import contestants
    from l3ms.benchmark.results import Measurement
    from l3ms.benchmark.run import GENEROUS, Plan, measure

    device, out, cases = ("cpu" if given.rehearse else "cuda"), json.loads(given.without), _cases(given)
    entrants = contestants(device)
    given.contestants = given.contestants or ",".join(entrants)
    slow = {name for name in entrants if given.rehearse and entrants[name].compiled}
    names = tuple(name for name in given.contestants.split(",") if name not in slow and name not in out)
    if not names:  # to a Plan, all
        return 0
    plan = Plan(cases=cases, contestants=names, memory=False, device=device, rounds=2 if given.rehearse else 5)
    target, end = _target(given, device), given.until - 0.05 * (given.until - time.time()) - 5
    results = parts.begun(target, device, plan.rounds, plan.seed, round(end - time.time()))

    for index in range(given.first, len(cases)):
        case, left = cases[index], end - time.time()

        def said(text: str) -> None:
            if device == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as error:
                    print(f"the device is unusable: {error}", flush=True)
                    os._exit(UNUSABLE)
            name = text.removeprefix(f"{case}: ").removesuffix(", first call")  # noqa: B023
            record(at=index, case=str(case), contestant=name if name in entrants else None)  # noqa: B023

        if left < 0:
            print(f"not measured, the time is over: {', '.join(map(str, cases[index:]))}")
            break
        said("begins")
        share = min(1, max(HALF, GENEROUS / (len(cases) - index)))
        result = measure(case, plan, said, time.monotonic() + share * left)
        result.measurements += [
            Measurement(contestant=name, title=entrants[name].title, kind="peer", reason=why)
            for name, why in out.items()
        ]
        results.add(result)
        parts.save(results, target)
        grid = tables.case_grid(result)
        print("\n".join([grid.title, tables.markdown(grid), *grid.notes]), flush=True)
    return 0


def _target(given: argparse.Namespace, device: str) -> Path:
    from l3ms.benchmark.environment import describe

    return given.output / f"{describe(device).device}.json"


def results(given: argparse.Namespace) -> int:
    """What the other steps found, entered into the file of the race; and what docs/benchmarks.md would say."""
    from l3ms.benchmark import parts
    from l3ms.benchmark.figure import save
    from l3ms.benchmark.page import section

    device = "cpu" if given.rehearse else "cuda"
    target = _target(given, device)
    found = parts.begun(target, device, 0, 0, None)
    found.parts = parts.parts_of(json.loads((given.output / "run.json").read_text())["records"])
    parts.save(found, target)
    print(section([found]))
    print(f"to keep it: cp {target.with_suffix('')}.* bench/results/ && python bench/update_page.py")
    if found.cases:
        save(found, target.with_suffix(".png"))
    return 0


STEPS = {
    "versions": versions, "products": products, "smoke": smoke, "row kernel": row_kernel,
    "workspaces": workspaces, "race": race, "results": results,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--until", type=float, default=time.time() + 60, help="seconds since 1970")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--row-kernels", default="auto", help="values of L3M_ROW_KERNEL")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--first", type=int, default=0, help="case of the race to begin with")
    parser.add_argument("--contestants", default="", help="only these; none: all")
    parser.add_argument("--without", default="{}", help="contestants that the race leaves out, and why, as JSON")
    given = parser.parse_args()
    return STEPS[given.step](given)


if __name__ == "__main__":
    sys.exit(main())
