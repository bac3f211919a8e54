"""Ranks sample from streams of their own: equal prompts on two of them get independent answers, as the standard errors count them, and
what is said of all is of all."""

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

import l3ms
from l3ms.rollouts import streams
from l3ms.training.constraint_step import divergences_of_now, of_mean_length, rewards_of, sampling_seed


@pytest.fixture
def drawn(monkeypatch, make_model):
    """drawn(...) -> numbers that a trainer's rollout draws on a rank, and where the generator of the rank is then."""
    model = make_model()

    def draw(rank=0, world=2, iteration=3, seed=0):
        monkeypatch.setattr(streams, "several_ranks", lambda: world > 1)
        monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
        args = types.SimpleNamespace(seed=seed, process_index=rank, world_size=world)
        training = types.SimpleNamespace(args=args, state=types.SimpleNamespace(global_step=iteration))
        with streams.own_stream(model, sampling_seed(training)):  # type: ignore[arg-type]
            return torch.rand(4).tolist()

    return draw


def test_each_rank_iteration_and_seed_has_its_own(drawn):
    known = [drawn(), drawn(rank=1), drawn(iteration=4), drawn(seed=1)]
    assert len({tuple(values) for values in known}) == 4
    assert drawn() == known[0]  # the same in a run that is resumed


@pytest.mark.parametrize("world", [1, 2])
def test_the_generator_of_a_rank_goes_on_as_it_was(drawn, world):
    torch.manual_seed(5)
    expected = torch.rand(8)
    torch.manual_seed(5)
    values = drawn(world=world)
    after = torch.rand(4)
    if world == 1:  # one process draws from the run's generator
        assert values == expected[:4].tolist()
        assert after.equal(expected[4:])
    else:
        assert after.equal(expected[:4])


def test_a_divergence_per_token_is_of_the_tokens_of_all_ranks():
    """Two ranks with unlike lengths: the mean of all rewards is the divergence of all responses over all their tokens."""
    lengths, nats = ([2, 4], [9, 9, 12]), ([1.0, 3.0], [2.0, 5.0, 7.0])
    found = []
    for own, other in ((0, 1), (1, 0)):
        rest: Any = torch.tensor([sum(lengths[other]), len(lengths[other])], dtype=torch.float64)
        mean = sum(lengths[own]) / len(lengths[own])
        rewards = {"kl": [value / mean for value in nats[own]], "length": lengths[own]}
        trainer: Any = types.SimpleNamespace(
            args=types.SimpleNamespace(world_size=2),
            accelerator=types.SimpleNamespace(reduce=lambda value, reduction, rest=rest: value + rest),
            constraints=[l3ms.KL(max=1.0, per_token=True), l3ms.Length(max=8)],
            policy=types.SimpleNamespace(device=torch.device("cpu")),
            reward_arguments=dict,
        )
        responses: Any = types.SimpleNamespace(
            rewards=lambda asked, *rest, rewards=rewards: {item.name: rewards[item.name] for item in asked}
        )
        share = of_mean_length(trainer, lengths[own])
        of_all = rewards_of(trainer, responses, share)
        assert of_all["length"] == lengths[own]
        assert divergences_of_now(trainer, responses, share) == {"kl": of_all["kl"]}
        found += of_all["kl"]
    assert sum(found) / len(found) == pytest.approx(sum(map(sum, nats)) / sum(map(sum, lengths)))
