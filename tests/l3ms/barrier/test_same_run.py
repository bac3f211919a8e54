"""One run by 1, 2 and 4 processes is the same run: DDP, fully_shard (also replicated), the vocabulary in parts, and both of these."""

import pytest
import rank_forks
import same_run_ranks
import torch

pytestmark = pytest.mark.slow

CASES = [(kind, world) for kind, worlds in same_run_ranks.KINDS.items() for world in worlds if world > 1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rank_forks.start("same_run_ranks", same_run_ranks.RANKS, folder, seconds=1200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(same_run_ranks.RANKS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "world"), CASES)
def test_multipliers_are_bit_equal_on_all_ranks(found, kind, world, dtype):
    _, bits = found[0][kind, world, dtype]
    for rank in found[1:]:
        assert torch.equal(bits.nan_to_num(nan=-1.0), rank[kind, world, dtype][1].nan_to_num(nan=-1.0))
    assert (bits[:, :4].max(0).values > bits[:, :4].min(0).values).all(), "every multiplier has moved"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("kind", "world"), CASES)
def test_weights_after_fifty_iterations_are_those_of_one_process(found, kind, world, dtype, tolerance):
    expected, _ = found[0]["whole", 1, dtype]
    start = [p.detach() for p in same_run_ranks.model(dtype=dtype).parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(expected, start, strict=True)) > 0.05
    for rank in found:
        weights, _ = rank[kind, world, dtype]
        apart = max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True))
        assert apart < tolerance
