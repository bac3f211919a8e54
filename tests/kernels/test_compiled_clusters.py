"""The row kernel that holds a row in a thread block cluster, as nvcc compiled it for sm_90, run: warps of all its blocks in random orders.

As `test_compiled_rows`. Rows are shorter than those that a launch would give to so many blocks: the kernel takes any number of both.
"""

import pytest
import torch
from compiled_rows import CLUSTER, NVCC, Compiled, barriers, cluster_kernel, cuda_ptx, excess, problem, without
from ptx.text import Fault

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not here: the CUDA kernels are not compiled"),
    pytest.mark.skipif(not CLUSTER.exists(), reason=f"there is no {CLUSTER.name}"),
]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """(gradient, extras, blocks, threads) -> Compiled"""
    source = cuda_ptx(tmp_path_factory.mktemp("ptx"), CLUSTER)

    def of(gradient, extras, blocks=2, threads=64) -> Compiled:
        return cluster_kernel(source, gradient, extras, blocks, threads)

    return of


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


OTHERS = [(gradient, extras) for gradient in (None, *DTYPES) for extras in (False, True)]


@pytest.mark.parametrize(
    ("gradient", "extras", "seed"),
    [
        (torch.bfloat16, False, 0),
        (torch.float32, True, 0),
        *slow(*((*OTHERS[seed % 8], 1000 + seed) for seed in range(80))),
    ],
)
def test_rows_against_float64(kernel, gradient, extras, seed):
    """The last block has a part of its columns; now and then a block has none."""
    vocabulary = (4093, 3001, 2049, 33, 4096)[seed % 5]
    rows = problem(seed, vocabulary, extras, gradient)
    assert excess(kernel(gradient, extras).run(rows, seed, inexact=seed), rows) <= 0


@pytest.mark.parametrize(("blocks", "threads"), [(4, 32), *slow((1, 96), (8, 32))])
def test_other_clusters(kernel, blocks, threads):
    rows = problem(1, blocks * threads * 32 - 31, False, torch.bfloat16).only(0)
    assert excess(kernel(torch.bfloat16, False, blocks, threads).run(rows, seed=1), rows) <= 0


def test_every_order_of_the_warps_gives_the_same_bits(kernel):
    rows = problem(2, 3001, False, torch.bfloat16).only(0)
    first, *others = (kernel(torch.bfloat16, False).run(rows, seed) for seed in range(2))
    for other in others:
        assert torch.equal(other.token, first.token)
        assert torch.equal(other.lse, first.lse)
        assert torch.equal(other.gradient, first.gradient)


def test_threads_race_without_any_one_of_the_barriers(kernel):
    """Without the last one of the cluster a block ends, and with it its shared memory, while another reads it."""
    compiled, rows = kernel(torch.bfloat16, False), problem(3, 4093, False, torch.bfloat16).only(0)
    lines = {
        line: each for each in compiled.program().entry.instructions for line in barriers(compiled) if each.line == line
    }
    within = [line for line, each in lines.items() if each.name.startswith("bar.sync")]
    of_cluster = [line for line, each in lines.items() if each.name.startswith("barrier.cluster")]
    assert len(within) == 2
    assert len(of_cluster) == 4  # twice arrive and wait
    for left_out in ([within[0]], [within[1]], of_cluster[:2]):
        with pytest.raises(Fault, match="race: thread"):
            without(compiled, left_out).run(rows, seed=3)
    with pytest.raises(Fault, match=r"race: another block reads .*part.* may have ended"):
        without(compiled, of_cluster[2:]).run(rows, seed=3)


def test_without_the_first_barrier_of_the_cluster_rows_are_wrong(kernel):
    """A 16-bit gradient lies over logits of another block, which has yet to read them."""
    compiled, rows = kernel(torch.bfloat16, False), problem(3, 4093, False, torch.bfloat16).only(0)
    lines = [each.line for each in compiled.program().entry.instructions if each.name.startswith("barrier.cluster")]
    mutant, wrong = without(compiled, lines[:2]), 0
    with pytest.raises(Fault, match="race: "):
        mutant.run(rows, seed=0)
    for seed in range(4):
        try:
            wrong += excess(mutant.run(rows, seed, watch=False), rows) > 0
        except (AssertionError, Fault):  # a NaN, or the memory of a block that has ended
            wrong += 1
    assert wrong, wrong
