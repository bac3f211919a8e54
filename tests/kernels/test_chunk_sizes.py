"""Rows of a chunk: within the workspace, not below its own floor, equal, and by whole waves of tiles."""

from typing import Any

import pytest

from l3m_kernels import chunk_sizes
from l3m_kernels.chunk_sizes import LEAST_ROWS, chunk_rows, default_workspace, row_bytes

R: dict[str, Any] = {"scored": 8192, "vocabulary": 128256, "width": 4096}
SHAPES = [(128256, 4096), (151936, 896), (32000, 4096), (256000, 3584), (262144, 5376), (1000, 64), (1, 1)]


@pytest.mark.parametrize(("vocabulary", "width"), SHAPES)
@pytest.mark.parametrize("scored", [1, 1023, 1024, 1025, 5000, 8192, 100_000])
def test_the_default_holds_its_own_floor(scored, vocabulary, width):
    """512 MiB or 1024 rows with their inputs: 998 to 1022 rows were rounded down to 768. Two chunks of 1025 rows are equal instead."""
    found = chunk_rows(scored, vocabulary, width, multiprocessors=132)
    fewest = -(-scored // found)
    assert found >= min(scored, LEAST_ROWS) or fewest == 2


@pytest.mark.parametrize(("vocabulary", "width"), SHAPES)
@pytest.mark.parametrize("workspace", [1, 40_000, 1 << 20, 512 << 20, 1 << 30, 3 << 30])
@pytest.mark.parametrize("multiprocessors", [1, 108, 132, 148])
@pytest.mark.parametrize("scored", [0, 1, 129, 1000, 8191, 100_000])
def test_within_the_workspace_and_equal(scored, multiprocessors, workspace, vocabulary, width):
    found = chunk_rows(scored, vocabulary, width, multiprocessors=multiprocessors, workspace_bytes=workspace)
    each = row_bytes(vocabulary, width, 2)
    assert found * each <= max(workspace, each)
    assert min(scored, 1) <= found <= scored
    if scored:
        chunks = -(-scored // found)
        assert found - chunk_sizes.TILE_ROWS < -(-scored // chunks) <= found  # equal but for what whole tiles are more


@pytest.mark.parametrize(
    ("workspace", "wanted"),
    [
        (None, 1024),  # 0.55 GB, 128 tiles of d_hidden on 132 multiprocessors
        (512 << 20, 912),  # 998 fit: 9 equal chunks, as many waves as 9 of 1024
        (1 << 30, 1024),  # 1997 fit, but 1536 and 1664 are two waves, the second half empty
        (2 << 30, 2048),
        (3 << 30, 4096),
    ],
)
def test_whole_waves_at_shape_r(workspace, wanted):
    assert chunk_rows(**R, multiprocessors=132, workspace_bytes=workspace) == wanted


def test_tiles_do_not_matter_to_one_multiprocessor():
    """Elsewhere than on a GPU: the fewest chunks."""
    for fit in (1024, 1536, 2000, 5000):
        workspace = fit * row_bytes(128256, 4096, 2)
        found = chunk_rows(**R, multiprocessors=1, workspace_bytes=workspace)
        assert -(-8192 // found) == -(-8192 // fit)


def test_without_a_weight_gradient_chunks_cost_no_traffic():
    """A frozen head sums nothing over chunks, so the waves alone decide: 12 tiles of rows are two waves, 8 are one."""
    workspace = 1536 * row_bytes(128256, 4096, 2)
    assert chunk_rows(**R, multiprocessors=132, workspace_bytes=workspace, d_weight=False) == 1024


def test_one_chunk_may_take_what_several_hold_besides():
    """With a 16-bit weight, several chunks hold an fp32 sum of its gradient and one does not: 4,900 rows at V = 128256, D = 4096."""
    accumulator = 4 * 128256 * 4096
    budget = default_workspace(128256, 4096, 2) + accumulator
    most = budget // row_bytes(128256, 4096, 2)
    assert 4900 < most < 5000
    for scored, wanted in ((most, most), (most + 1, 1024)):
        found = chunk_rows(scored, 128256, 4096, multiprocessors=132, accumulator_bytes=accumulator)
        assert found == wanted
