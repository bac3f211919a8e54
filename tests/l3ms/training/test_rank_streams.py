"""Ranks sample from streams of their own: equal prompts on two of them get independent answers, as the standard errors count them."""

import types

import pytest
import torch
import torch.distributed as dist

from l3ms.rollouts import streams
from l3ms.training.constraint_step import sampling_seed


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
