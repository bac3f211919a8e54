"""Two processes that share a batch find the multipliers and the gradient of one process that has it all."""

import pytest
import rank_forks
import ranks
import torch

import l3ms

NAMES = ("multiplier of the samples", "multiplier", "estimate", "stderr", "batch mean", "mu", "gradient", "weights")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rank_forks.start("ranks", 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank():
    return ranks.run([[8]], 0, 1)


@pytest.mark.parametrize("split", ranks.SPLITS)
def test_every_rank_finds_the_same_bits(two_ranks, split):
    first, second = (rank[split] for rank in two_ranks)
    for step, found in enumerate(zip(first, second, strict=True)):
        for name, ours, theirs in zip(NAMES, *found, strict=True):
            assert torch.equal(ours, theirs), (step, name)


@pytest.mark.parametrize("split", ranks.SPLITS)
def test_two_ranks_find_what_one_finds(two_ranks, one_rank, split):
    for step, found in enumerate(zip(two_ranks[0][split], one_rank, strict=True)):
        for name, ours, theirs in zip(NAMES, *found, strict=True):
            # The weights of the responses are fp32: their rounding is all that may differ.
            tolerance = 1e-6 if name in ("gradient", "weights") or step > 0 else 1e-13
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert (one_rank[0][-1] - one_rank[-1][-1]).abs().max() > 1e-2  # the steps are not empty


def test_lengths_give_bit_identical_multipliers_however_they_are_split(two_ranks, one_rank):
    for split in ranks.SPLITS:
        assert torch.equal(two_ranks[0][split][0][0][1:3], one_rank[0][0][1:3])  # both bounds of the length


@pytest.mark.parametrize(("fused", "tolerance"), [(False, 1e-12), (True, 1e-6)])
def test_sharded_parameters_take_the_steps_of_whole_ones(two_ranks, fused, tolerance):
    (first, values), (second, others) = (rank[f"sharded, fused {fused}"] for rank in two_ranks)
    weights, expected = ranks.sharded(1, fused)
    assert torch.equal(first, second)
    assert values == others
    del values["constraints/size/stderr"], expected["constraints/size/stderr"]  # of two equal batches it is smaller
    assert values == pytest.approx(expected, rel=1e-6)
    assert values["l3m/skipped_steps"] == 1
    torch.testing.assert_close(first, weights, rtol=tolerance, atol=tolerance)


def test_ranks_that_differ_are_named_on_all_of_them(two_ranks):
    first, second = (rank["agreeing"] for rank in two_ranks)
    assert first == second
    assert first["equal"] == ""
    assert first["weight"].startswith("step 1: rank 1 in head differs from the other ranks")
    assert first["number"].startswith("agree: rank 1 in parameter 0 differs")
    assert first["multiplier"].startswith("agree: rank 1 in the multipliers differs")


REFUSALS = {
    "list": "ValueError: observe: constraint 'polite': row 1 is nan",
    "tensor": "ValueError: observe: constraint 'polite': row 0 is nan",
    "differentiable": "ValueError: observe: constraint 'polite': row 0 is nan",
    "name": "ValueError: observe: wanted values for constraints among ['polite'], got ['rude']",
    "function": "ZeroDivisionError: ",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_one_rank_refuses_is_an_error_on_every_rank(two_ranks, case):
    """The others would wait for its sums. What was refused leaves nothing behind."""
    first, second = (rank["refused"] for rank in two_ranks)
    assert second[case].startswith(REFUSALS[case])
    assert first[case].startswith("OtherRankRefused: observe: another rank refused its values")
    assert first["estimate"] == second["estimate"] == (0 + 2 + 1 + 2) / 4


def test_the_whole_world_is_used_only_where_it_is_initialised():
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert l3ms.L3MOptimizer(base, [l3ms.Length(max=1)]).estimates.process_group is None
