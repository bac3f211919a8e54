"""G2: Triton's kernels in its interpreter on random calls, and compiled ahead of time for each architecture: registers, spills, memory."""

from __future__ import annotations

import importlib.util
from functools import partial

from parts import Found, Part, Skipped, each

VARIANTS = 85  # of kernels and configurations


def interpreted(seeds: range) -> Found:
    _triton()
    import interpreter

    interpreter.prepare()
    from head_cases import Case
    from test_triton_fuzz import fuzz

    return each(lambda seed: fuzz(seed, Case.hard), seeds)


def compiled(architecture: int, seeds: range) -> Found:
    """A case is a variant: a kernel with its types and options, in a configuration. Seeds choose none, they count them."""
    _triton()
    from l3m_kernels.triton_ops.ahead import ARCHITECTURES, compile_one, variants

    chosen, found = list(variants()), Found()
    assert len(chosen) == VARIANTS, f"there are {len(chosen)} variants, not {VARIANTS}"

    def compile_variant(index: int) -> float:
        variant = chosen[index]
        result = compile_one(variant, architecture)
        name = f"{variant.kernel} {variant.name}, block {variant.block}"
        assert result.problem is None, f"{name}: {result.problem}"
        for title, value in (("registers", result.registers), ("bytes of shared memory", result.shared)):
            found.figures[title] = max(found.figures.get(title, 0), value)
        found.figures["bytes spilled"] = max(found.figures.get("bytes spilled", 0), result.spilled)
        return result.shared / ARCHITECTURES[architecture]

    found.figures["kernels"] = len({variant.kernel for variant in chosen})
    found.add(each(compile_variant, [seed % 10_000_000 for seed in seeds]))
    return found


def _triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise Skipped("Triton is not installed")


def parts() -> list[Part]:
    interpreter = {"TRITON_INTERPRET": "1"}
    found = [Part("interpreted", interpreted, 1500, slice=12, piece=250, environment=interpreter, seconds=260)]
    for architecture in (80, 90, 100, 120):
        run = partial(compiled, architecture)
        found.append(Part(f"compiled for sm_{architecture}", run, VARIANTS, piece=VARIANTS, seconds=50))
    return found
