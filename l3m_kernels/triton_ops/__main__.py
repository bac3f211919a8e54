"""`python -m l3m_kernels.triton_ops`: compile every kernel for every architecture, without a GPU, and say what each needs.

A row of the table is a kernel with its dtypes and options, in a configuration of `configs.py`, on an architecture. The exit status is 1
where one does not compile, spills registers, or wants more shared memory than a block has.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from l3m_kernels.triton_ops.ahead import ARCHITECTURES, Compiled, compile_one, variants


def table(results: list[Compiled]) -> Table:
    found = Table(title="Triton kernels compiled ahead of time")
    for name in ("kernel", "variant", "block", "warps", "sm", "registers", "spills (bytes)", "shared (bytes)", "limit"):
        found.add_column(name, justify="left" if name in ("kernel", "variant") else "right")
    for result in results:
        variant, numbers = result.variant, (result.registers, result.spilled, result.shared, result.shared_limit)
        style = "red" if result.problem else None
        cells = (variant.kernel, variant.name, variant.block, variant.warps, result.architecture, *numbers)
        found.add_row(*map(str, cells), style=style)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m l3m_kernels.triton_ops", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), help="compute capabilities, as 90")
    parser.add_argument("--main", action="store_true", help="only the main variants of each kernel and configuration")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    results = []
    with console.status("compiling") as status:
        chosen = [variant for variant in variants() if variant.main or not arguments.main]
        for architecture in arguments.arch:
            for variant in chosen:
                status.update(f"sm_{architecture} {variant.kernel} {variant.name}")
                results.append(compile_one(variant, architecture))
    console.print(table(results))
    problems = [result for result in results if result.problem]
    for result in problems:
        console.print(f"sm_{result.architecture} {result.variant.kernel} {result.variant.name}: {result.problem}")
    console.print(f"{len(results)} compiled, {len(problems)} with a problem")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
