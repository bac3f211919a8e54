"""What the head is expected to take on a GPU, and why: `python -m l3m_kernels.roofline 8192 4096 128256 --device h200`.

A model, in plain Python: no GPU is asked. `step_times` has the formulas, `gpu_rates` the numbers and where they are from, `chunk_sizes` the
rule by which the backends cut a batch.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from l3m_kernels.gpu_rates import GPUS, Gpu
from l3m_kernels.step_times import AFTER, BEFORE, ITEMSIZE, Estimate, Problem, Step, estimate

BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"
# What docs/kernels.md shows: R, the benchmark's other shapes on a GPU, the wide vocabulary of a small model, a small one of a large model.
SHOWN = (
    (8192, 4096, 128256),
    (8192, 2048, 128256),
    (8192, 3584, 152064),
    (4096, 2304, 256000),
    (8192, 896, 151936),
    (8192, 4096, 32000),
)
# On an H200, bench/results/nvidia-h200.md and, before the last changes, nvidia-h200-steps.md: milliseconds and share of the limit.
MEASURED = {(8192, 4096, 128256): "36.2, 0.90", (8192, 2048, 128256): "24.0, 0.68"}
PASSES = {1: "log-likelihoods, no gradient", 2: "forward and backward, frozen head", 3: "forward and backward"}


def _range(least: float, most: float, form: str, between: str = " to ") -> str:
    one, other = format(least, form), format(most, form)
    return one if one == other else f"{one}{between}{other}"


def _milliseconds(step: Step | None) -> str:
    return "-" if step is None else _range(step.least * 1e3, step.most * 1e3, ".2f")


def _share(found: Estimate) -> str:
    return _range(*found.share, ".2f")


def _total(found: Estimate) -> str:
    least, most = found.seconds
    return _range(least * 1e3, most * 1e3, ".1f")


def _cut(found: Estimate) -> str:
    """8 x 1024 rows, or 10 x 768 and 512; of the logits alone where the gradients are gathered."""
    first, last = found.chunks[0], found.chunks[-1]
    count = len(found.chunks) - (last != first)
    return f"{count} x {first}{f' and {last}' if last != first else ''}{', gathered' if found.gathered else ''}"


def _rows_of(before: Estimate, after: Estimate) -> list[list[str]]:
    """A line for each step, as `COLUMNS` says."""
    then, now = ({step.name: step for step in found.steps} for found in (before, after))
    lines = []
    for name in dict.fromkeys([*then, *now]):
        step = now.get(name) or then[name]
        lines.append(
            [
                name,
                f"{step.flops / 1e12:.3g}" if step.flops else "-",
                _milliseconds(then.get(name)),
                _milliseconds(now.get(name)),
                f"{step.bytes / 1e9:.3g}" if name in now else "0",
                "-" if step.busy is None else f"{step.busy:.0%}",
            ]
        )
    lines.append(["all", "", _total(before), _total(after), "", ""])
    lines.append(["share of the limit", "", _share(before), _share(after), "", ""])
    return lines


COLUMNS = ["step", "TFLOP", "before, ms", "with the mends, ms", "GB then", "tiles busy then"]


def describe(problem: Problem, gpu: Gpu) -> str:
    """What the command prints of one shape."""
    before, after = (estimate(problem, gpu, design) for design in (BEFORE, AFTER))
    rows = [COLUMNS, *_rows_of(before, after)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    table = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    n, D, V = problem.rows, problem.hidden, problem.vocabulary
    worst = after.largest_loss
    return "\n".join(
        [
            f"n={n} ({problem.scored} scored), D={D}, V={V}, {problem.dtype}: {PASSES[len(problem.products)]}",
            f"limit {after.limit * 1e3:.1f} ms: {len(problem.products)} x 2 n D V = {after.limit_flops / 1e12:.4g} TFLOP",
            f"chunks: {_cut(before)} rows before, {_cut(after)} with the mends ({after.held / 2**20:.0f} MiB)",
            *(f"  {line.rstrip()}" for line in table),
            f"largest loss before, {before.largest_loss.lost * 1e3:.2f} ms: {before.largest_loss.why}",
            f"largest loss with the mends, {worst.lost * 1e3:.2f} ms: {worst.why}",
        ]
    )


def section(gpu: Gpu = GPUS["h200"]) -> str:
    """What stands in docs/kernels.md between the two marks."""
    pairs = [tuple(estimate(Problem(*shape), gpu, design) for design in (BEFORE, AFTER)) for shape in SHOWN]
    header = [
        "n, D, V",
        "limit, ms",
        "chunks before",
        "with the mends",
        "before, ms",
        "share",
        "with the mends, ms",
        "share",
    ]
    header += ["measured, ms, share", "largest loss that is left"]
    shapes = []
    for (n, D, V), (before, after) in zip(SHOWN, pairs, strict=True):
        worst = after.largest_loss
        shapes.append(
            [
                f"{n}, {D}, {V}", f"{after.limit * 1e3:.1f}", _cut(before), _cut(after),
                _total(before), _share(before), _total(after), _share(after),
                MEASURED.get((n, D, V), "not measured yet"), f"{worst.lost * 1e3:.1f} ms: {worst.why}",
            ]
        )  # fmt: skip
    parts = [
        f"{gpu.title}, bf16, all rows scored, default workspace. Shape R, a step at a time:",
        _markdown(COLUMNS, _rows_of(*pairs[0])),
        "All shapes:",
        _markdown(header, shapes),
        "Where the numbers are from:",
        "\n".join(f"- {line}" for line in gpu.sources()),
    ]
    return "\n\n".join(parts)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewrite(page: Path) -> bool:
    """Put `section` into a page; whether that changed it.

    Raises:
        ValueError: the page has not the two marks.
    """
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no {BEGIN} ... {END}")
    changed = pattern.sub(lambda _: f"{BEGIN}\n{section()}\n{END}", text)
    page.write_text(changed, encoding="utf-8")
    return changed != text


# ---- the command -----------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _masked(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a share of the rows, at least 0 and less than 1, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("python -m l3m_kernels.roofline", description=__doc__, allow_abbrev=False)
    found.add_argument(
        "sizes",
        nargs="*",
        type=_size,
        metavar="n D V",
        help="rows, hidden size, vocabulary; several shapes one after the other",
    )
    found.add_argument("--device", choices=sorted(GPUS), default="h200")
    found.add_argument("--rate", type=_positive, metavar="TFLOPS", help="of products, instead of the device's")
    found.add_argument(
        "--bandwidth", type=_positive, metavar="TBS", help="TB/s of device memory, instead of the device's"
    )
    found.add_argument("--dtype", choices=sorted(ITEMSIZE), default="bf16")
    found.add_argument("--masked", type=_masked, default=0.0, metavar="SHARE", help="of the rows that is not scored")
    found.add_argument("--frozen", action="store_true", help="no gradient of the weight")
    found.add_argument("--no-grad", action="store_true", help="log-likelihoods alone")
    found.add_argument("--workspace", type=_positive, metavar="MIB", help="instead of the default")
    found.add_argument(
        "--docs", type=Path, metavar="PAGE", help="rewrite the section of docs/kernels.md, and nothing else"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser()
    given = command.parse_args(arguments)
    if given.docs:
        try:
            print(f"{given.docs} {'changed' if rewrite(given.docs) else 'is up to date'}")
        except (OSError, ValueError) as error:
            command.error(f"--docs: {error}")
        return 0
    if not given.sizes or len(given.sizes) % 3:
        command.error(f"n D V: three numbers for each shape, as 8192 4096 128256, got {len(given.sizes)}")
    if given.frozen and given.no_grad:
        command.error("--frozen: has a gradient, of the hidden states; leave out it or --no-grad")
    gpu = GPUS[given.device].with_rates(given.rate and given.rate * 1e12, given.bandwidth and given.bandwidth * 1e12)
    workspace = None if given.workspace is None else max(int(given.workspace * 2**20), 1)
    print(gpu.title, *(f"  {line}" for line in gpu.sources(given.dtype)), sep="\n")
    for first in range(0, len(given.sizes), 3):
        n, D, V = given.sizes[first : first + 3]
        problem = Problem(n, D, V, given.dtype, given.masked, given.frozen, not given.no_grad, workspace)
        if problem.scored < 1:
            command.error(f"--masked: leaves none of {n} rows scored, got {given.masked:g}")
        print("", describe(problem, gpu), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
