"""A training whose responses an engine samples: the policy's weights go there first, and the log says how far its numbers are."""

import pytest
import torch
from engines import Copying
from training_runs import assert_same_weights, run

import l3ms
from l3ms.rollouts.engines import Response
from l3ms.rollouts.transformers_engine import TransformersEngine
from l3ms.training.engine_gap import EngineGap


def gaps_of(trainer):
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [(row["l3m/engine_gap"], row["l3m/engine_gap_p99"]) for row in rows]


def test_a_training_on_the_models_own_engine_is_the_training_without_one(tmp_path, make_model, tokenizer):
    plain, _ = run(tmp_path / "a", tokenizer, make_model(seed=1))
    engine = TransformersEngine(make_model(seed=5), tokenizer)
    trainer, _ = run(tmp_path / "b", tokenizer, make_model(seed=1), engine=engine)
    assert engine.model is trainer.policy
    assert_same_weights(trainer.model, plain.model, tolerance=0)
    assert not any("engine_gap" in name for row in trainer.state.log_history for name in row)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gap_is_small_where_the_weights_are_the_policys_and_large_where_they_were(
    tmp_path, make_model, tokenizer, temperature
):
    options = {"learning_rate": 0.3, "max_steps": 4, "temperature": temperature}
    engine = Copying(tokenizer)
    right, _ = run(tmp_path / "a", tokenizer, make_model(seed=1), engine=engine, **options)
    assert engine.asked == ["update", "sample"] * 4
    for mean, p99 in gaps_of(right):
        assert 0 <= mean < 1e-5
        assert mean <= p99 < 1e-4
    stale, _ = run(tmp_path / "b", tokenizer, make_model(seed=1), engine=Copying(tokenizer, updates=False), **options)
    found = gaps_of(stale)
    assert found[0][0] < 1e-5
    assert all(mean > 1e-2 and p99 > mean for mean, p99 in found[1:])


def test_gradients_are_of_the_training_models_likelihoods(tmp_path, make_model, tokenizer):
    """The same tokens with and without an engine's numbers: the same weights, to the bit."""

    class Lying(TransformersEngine):
        numbers = False

        def sample(self, *args, **options):
            found = super().sample(*args, **options)
            return [Response(r.tokens, r.ended, [-7.0] * len(r.tokens) if self.numbers else None) for r in found]

    class Numbers(Lying):
        numbers = True

    one, two = (
        run(tmp_path / kind.__name__, tokenizer, make_model(seed=1), engine=kind(None, tokenizer))[0]
        for kind in (Lying, Numbers)
    )
    assert_same_weights(one.model, two.model, tolerance=0)
    assert all(mean > 1 for mean, _ in gaps_of(two))


def test_the_gap_of_known_numbers(tokenizer):
    responses = [Response([3, 4, 1], True, [-1.0, -2.0, -3.0]), Response([5], False, [-1.0])]
    out = l3ms.Rollout.from_tokens(tokenizer, ["a", "b c"], [[3], [4, 5]], responses)
    token = torch.zeros(out.input_ids.shape)
    token[0, :3] = torch.tensor([-1.5, -2.0, -3.0])
    token[1, 1] = -1.25
    gap = EngineGap(out)
    assert gap.log() == {}
    gap.add([1], token[1:2, :3])
    gap.add([0], torch.nn.functional.pad(token[:1], (2, 0)))  # a learned prompt stands before it
    assert gap.log() == pytest.approx({"l3m/engine_gap": 0.75 / 4, "l3m/engine_gap_p99": 0.5})


def test_what_is_no_engine_is_refused_before_anything(tmp_path, make_model, tokenizer):
    with pytest.raises(ValueError, match="engine: wanted an object with sample"):
        run(tmp_path, tokenizer, make_model(), engine="vllm")
