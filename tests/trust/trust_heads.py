"""G1: random calls of the fused head on a CPU, each path of instructions that this machine has."""

from __future__ import annotations

from parts import Found, Part, each


def heads(seeds: range) -> Found:
    from test_cpp_fuzz import fuzz

    return each(fuzz, seeds)


def parts() -> list[Part]:
    return [Part("cpp", heads, 20_000, slice=200, seconds=200)]
