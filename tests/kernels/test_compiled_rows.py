"""The compiled row kernels, run: what Triton and nvcc made of them for sm_90, warps in random orders, against float64.

Without a GPU this is as near to one as it gets: the machine's code is one step on (`ptx` says what that leaves out). Exponentials and
quotients are off by as much as the hardware's may be. Two threads that touch one byte between two barriers fail a test by themselves,
in every order; what goes wrong then is seen where the second pass has no barrier.
"""

import importlib.util

import pytest
import torch
from compiled_rows import (
    CUDA,
    NVCC,
    Compiled,
    barriers,
    cuda_kernel,
    cuda_ptx,
    excess,
    interpreted,
    problem,
    second_pass_barriers,
    triton_kernel,
    without,
)
from ptx.text import Fault

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILERS = [
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("triton") is None or interpreted(), reason="Triton compiles nothing here"
        ),
    ),
    pytest.param(
        "nvcc", marks=pytest.mark.skipif(NVCC is None, reason="nvcc is not here: the CUDA kernels are not compiled")
    ),
]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """(compiler, gradient, extras, known, block, warps) -> Compiled, of 4 warps or more where it is nvcc's."""
    kept = {}

    def of(compiler, gradient, extras, known=False, block=256, warps=2, aligned=True) -> Compiled:
        key = (compiler, gradient, extras, known, block, warps, aligned)
        if compiler == "nvcc":  # one for all; 8 columns a thread
            key = (compiler, gradient, warps, aligned)
        if key not in kept:
            if compiler == "triton":
                kept[key] = triton_kernel(gradient, extras, known, block, warps)
            else:
                if "ptx" not in kept:
                    kept["ptx"] = cuda_ptx(tmp_path_factory.mktemp("ptx"), CUDA)
                kept[key] = cuda_kernel(kept["ptx"], gradient, aligned, max(32 * warps, 128))
        return kept[key]

    return of


def seeds(default: int, slow: int):
    return [*range(default), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1000, 1000 + slow))]


@pytest.mark.parametrize("seed", seeds(1, 12))
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("known", [False, True], ids=["lse", "known"])
@pytest.mark.parametrize("gradient", DTYPES, ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_rows_against_float64(kernel, compiler, gradient, known, extras, seed):
    """A tile and more, and an odd number of columns."""
    compiled = kernel(compiler, gradient, extras, known)
    vocabulary = 641 if compiler == "triton" else 1281
    rows = problem(seed, vocabulary, extras, gradient, known)
    found = compiled.run(rows, seed, inexact=seed)
    assert excess(found, rows) <= 0


@pytest.mark.parametrize("gradient", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_order_of_the_warps_gives_the_same_bits(kernel, compiler, gradient):
    compiled = kernel(compiler, gradient, False, warps=4, block=128)
    rows = problem(5, 300 if compiler == "triton" else 1101, False, gradient).only(0, 2)
    found = [compiled.run(rows, seed) for seed in range(3)]
    assert excess(found[0], rows) <= 0
    for other in found[1:]:
        assert torch.equal(other.token.view(torch.int32), found[0].token.view(torch.int32))
        assert torch.equal(other.lse.view(torch.int32), found[0].lse.view(torch.int32))
        if gradient is not None:
            assert other.gradient is not None
            assert found[0].gradient is not None
            torch.testing.assert_close(other.gradient, found[0].gradient, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("known", [False, True], ids=["lse", "known"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_without_the_barrier_of_the_second_pass_rows_are_wrong(kernel, compiler, known, gradient):
    """A 16-bit gradient lies over logits that other warps have yet to read: in some of the orders they read it."""
    compiled = kernel(compiler, gradient, False, known, block=128, warps=2 if compiler == "triton" else 4)
    removed = second_pass_barriers(compiled)
    assert len(removed) == (1 if compiler == "triton" else 2)  # nvcc: of whole tiles, and of the last one
    mutant = without(compiled, removed)
    rows = problem(3, 301 if compiler == "triton" else 1301, False, gradient, known).only(0)
    with pytest.raises(Fault, match=r"(ld|st)\.global.*: race: thread \d+ \w+ byte \d+ of logits"):
        mutant.run(rows, seed=0)
    wrong = 0
    for seed in range(4):
        assert excess(compiled.run(rows, seed), rows) <= 0
        try:
            wrong += excess(mutant.run(rows, seed, watch=False), rows) > 0
        except AssertionError:  # a NaN where there is none
            wrong += 1
    assert wrong >= 2, wrong


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_threads_race_without_any_one_of_the_barriers(kernel, compiler, gradient):
    """So none is there for nothing, and none that is needed would be missed here."""
    compiled = kernel(compiler, gradient, False, block=128, warps=2 if compiler == "triton" else 4)
    # CUDA C++: the barrier of whole tiles is needed in the first, that of the last tile where it is the first.
    sizes = (301,) if compiler == "triton" else (301, 1301)
    calls = [problem(3, size, False, gradient).only(0) for size in sizes]
    lines = barriers(compiled)
    assert len(lines) >= 3
    for line in lines:
        mutant, caught = without(compiled, [line]), 0
        for rows in calls:
            try:
                mutant.run(rows, seed=line)
            except Fault as fault:
                caught += "race: " in str(fault)
        if compiler == "triton" and gradient == torch.float32 and line in second_pass_barriers(compiled):
            assert not caught  # in place, each thread over its own: not needed, and fast enough to keep
        else:
            assert caught, f"PTX line {line}"


@pytest.mark.parametrize("seed", seeds(2, 20))
@pytest.mark.parametrize("compiler", COMPILERS[1:])
def test_rows_that_are_not_aligned(kernel, compiler, seed):
    gradient = DTYPES[seed % 3]
    compiled = kernel(compiler, gradient, True, warps=4, aligned=False)
    rows = problem(seed, 1101, True, gradient, known=seed % 2 == 1)
    stride = 1101 + seed % 5
    assert excess(compiled.run(rows, seed, stride=stride, shift=4 * (1 + seed % 3), inexact=seed), rows) <= 0


@pytest.mark.parametrize("seed", seeds(1, 6))
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_largest_configuration(kernel, compiler, seed):
    """16 warps, rows of two tiles and more."""
    gradient = DTYPES[seed % 3]
    compiled = kernel(compiler, gradient, True, block=4096, warps=16)
    rows = problem(seed, 4097 + 512 * (seed % 9), True, gradient).only(3)
    assert excess(compiled.run(rows, seed, inexact=seed), rows) <= 0


@pytest.mark.parametrize("seed", seeds(0, 60))
@pytest.mark.parametrize("compiler", COMPILERS)
def test_many_widths(kernel, compiler, seed):
    gradient, extras, known = (None, *DTYPES)[seed % 4], seed % 3 == 1, seed % 5 == 2 and seed % 4 != 0
    compiled = kernel(compiler, gradient, extras, known, block=128, warps=1 + seed % 2)
    vocabulary = (1, 2, 31, 33, 127, 128, 129, 255, 257, 511, 1024, 1025, 2049)[seed % 13]
    rows = problem(seed, vocabulary, extras, gradient, known)
    assert excess(compiled.run(rows, seed, inexact=seed or None), rows) <= 0
