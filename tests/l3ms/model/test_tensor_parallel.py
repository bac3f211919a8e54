"""Models that transformers has split over two ranks (`tp_plan="auto"`): the fused head computes where the head's rows are."""

import pytest
import rank_forks
import torch

MODELS = ("llama", "tied", "gemma2")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    rank_forks.start("tensor_parallel_ranks", 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_one_process(ranks, name):
    for rank in ranks:
        found, wanted = rank[name]["parallel"], rank[name]["whole"]
        torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["token"], wanted["token"], rtol=1e-5, atol=1e-5)
        assert found["gradients"].keys() == wanted["gradients"].keys()
        for parameter, gradient in wanted["gradients"].items():
            torch.testing.assert_close(found["gradients"][parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
        assert torch.equal(found["token"], ranks[0][name]["parallel"]["token"])


@pytest.mark.parametrize("name", MODELS)
def test_sampling_goes_through_the_models_own_head(ranks, name):
    for rank in ranks:
        assert rank[name]["parallel"]["sampled"].shape[1] > 4
        assert torch.equal(rank[name]["parallel"]["sampled"], rank[name]["whole"]["sampled"])


@pytest.mark.parametrize("name", MODELS)
def test_the_weight_and_its_gradient_stay_split_by_rows(ranks, name):
    for index, rank in enumerate(ranks):
        shard = "(Shard(dim=0),)"
        assert rank[name]["layout"] == [shard, (9 - index, 16), shard]
        assert rank[name]["tied"] == (name != "llama")


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_on_a_split_head_is_refused(ranks, name):
    for rank in ranks:
        assert "has an adapter (Linear) on a tensor-parallel lm_head: leave lm_head out" in rank[name]["adapter"]
