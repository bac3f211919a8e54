"""Models that fully_shard has split over two processes do what whole ones do."""

import pytest
import rank_forks
import sharded_ranks
import torch

GRADIENTS = [name for name in sharded_ranks.CHECKS if name.startswith("gradients")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """found(name) -> what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    everything = start(folder, 2)

    def of(name):
        ranks = [rank[name] for rank in everything]
        for text in ranks:
            assert not isinstance(text, str), text
        return ranks

    return of


def start(folder, world, *names):
    rank_forks.start("sharded_ranks", world, folder, *names)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("case", GRADIENTS)
def test_the_gradient_and_its_norm_are_those_of_a_whole_model(found, case):
    for rank in found(case):
        assert rank["parts"], "an optimizer that is made next holds what is trained"
        assert rank["apart"] < 1e-4
        assert rank["losses"][0] == rank["losses"][1]
        assert rank["norm"][0] == pytest.approx(rank["norm"][1], rel=1e-6)
        assert rank["norm"][0] > 1


def test_ranks_whose_responses_end_early_go_on_with_the_others(found):
    """Unlike numbers of prompts and batches, and in every way of sampling the responses of a whole model."""
    lengths = []
    for rank in found("ends"):
        for kind in ("padded", "equal lengths", "forward"):
            split, whole = rank[kind]
            assert split == whole, kind
        lengths.append(sorted(map(len, rank["padded"][0])))
        assert rank["parts"], "what is left behind is what is trained"
    assert len(lengths[0]) != len(lengths[1])
    assert lengths[0][0] < 9


def test_ranks_sample_from_streams_of_their_own(found):
    first, second = found("streams")
    for asked in ("drawn", "seeded"):
        for ours, theirs in zip(first[asked], second[asked], strict=True):
            assert ours != theirs
    assert first["drawn"][0] != first["drawn"][1]
    assert first["seeded"][0] == first["seeded"][1] != first["seeded"][2]
    assert first["engine"] != second["engine"]
    assert first["one batch"] == second["one batch"], "ranks with one batch, as of tensor parallelism, draw alike"
    assert torch.equal(first["after"], second["after"]), "what is drawn next (dropout) is in step"


def test_kl_is_from_a_reference_in_parts(found):
    for rank in found("divergence"):
        assert rank["split"] == pytest.approx(rank["whole"], rel=1e-5, abs=1e-5)
        assert max(map(abs, rank["whole"])) > 0.1
        assert all(rank["parts"])


def test_averages_are_those_of_a_whole_model(found):
    first, second = found("averages")
    for rank in (first, second):
        split, whole = rank["split"], rank["whole"]
        assert rank["taken up"]
        assert split["kinds"] == {torch.float32}
        assert split["class"] == whole["class"] == "LlamaForCausalLM"
        assert split["copied"].keys() == whole["copied"].keys()
        for name, parameter in whole["copied"].items():
            assert torch.equal(split["copied"][name], parameter), name
        assert torch.equal(split["logits"], whole["logits"])
        assert torch.equal(split["likelihood"], whole["likelihood"])
    assert not second["split"]["kept"], "the first rank alone writes it"
    for name, mean in first["whole"]["kept"].items():
        assert torch.equal(first["split"]["kept"][name], mean), name


@pytest.mark.parametrize("first", [True, False])
def test_mixed_precision_leaves_weights_of_sequences_and_likelihoods_exact(found, first):
    for rank in found("precision"):
        assert rank[first]["kinds"] == {torch.float32}
        assert rank[first]["grads"] == {torch.float32}
        assert rank[first]["apart"] < 1e-6


def test_adapters_are_split_with_what_they_are_on(found):
    for rank in found("adapters"):
        split, whole = rank["split"], rank["whole"]
        for ours, theirs in zip(split["values"], whole["values"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert whole["values"][0] != pytest.approx(whole["values"][1])
        assert split["grads"].keys() == whole["grads"].keys()
        for name, gradient in whole["grads"].items():
            torch.testing.assert_close(split["grads"][name], gradient, rtol=1e-5, atol=1e-5)
        assert split["answers"] == whole["answers"]
        assert rank["copy"].keys() == split["now"].keys()
        for name, parameter in rank["copy"].items():
            assert torch.equal(parameter, split["now"][name]), name


def test_what_goes_on_from_a_state_is_what_was_not_interrupted(found):
    first, second = found("states")
    for (weights, metrics), (resumed, again) in (first, second):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, resumed, strict=True))
        assert metrics == again
        assert metrics["constraints/length/lambda"] > 0
    assert first[0][1] == second[0][1]


def test_a_matrix_in_parts_is_gathered_for_the_loss_of_ones_own_loop(found):
    for split, whole in found("heads of one's own"):
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)
        assert whole.abs().max() > 0.1


REFUSED = {
    "fuse_head of FSDP1": "fuse_head: FullyShardedDataParallel (FSDP1) flattens the weights; use fully_shard (FSDP2)",
    "optimizer of FSDP1": "L3MOptimizer: FullyShardedDataParallel (FSDP1) flattens the weights; use fully_shard (FSDP2)",
    "fuse_head of ZeRO-3": "fuse_head: DeepSpeed ZeRO-3 keeps no weight in its own shape; use fully_shard (FSDP2)",
    "optimizer of ZeRO-3": "L3MOptimizer: DeepSpeed ZeRO-3 keeps no weight in its own shape; use fully_shard (FSDP2)",
    "optimizer of tensor parallelism": "process_group is missing: the weights are in parts over tp, whose ranks share a batch",
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_parts_are_refused_in_one_line(found, case):
    for rank in found("refusals"):
        assert rank[case].startswith(REFUSED[case])
        assert "\n" not in rank[case]
