"""Iterations without a constraint half-step, and several half-steps from one rollout."""

import math
from pathlib import Path

import pytest
import torch
from engines import Copying
from training_runs import assert_same_weights, rows, timeless

import l3ms
from l3ms.barrier.importance import LEAST_SHARE
from l3ms.training import constraint_step
from l3ms.training.fewer_samples import MOST_LEFT_OUT, FewerSamples, Kept
from l3ms.training.state_trees import load_tree, save_tree

EASY = l3ms.Length(max=16)  # no response is longer


def logged(trainer, key):
    return [row.get(key) for row in trainer.state.log_history if "loss" in row]


def sampled(recorder):
    """Response tokens of each iteration, 0 where it has not sampled; `last_rollout` stays what it was there."""
    before, found = None, []
    for rollout in recorder.rollouts:
        found.append(0 if rollout is before else rollout.scored)
        before = rollout
    return found


def test_half_steps_are_left_out_while_the_constraints_are_comfortably_met(make_model, train):
    data = l3ms.DataNLL("general", rows(8, seed=3), max=50.0, batch_size=4)
    options = {"max_steps": 20, "warmup_steps": 4, "learning_rate": 0.01}
    trainer, recorder = train(make_model(), constraints=[EASY, data], rollout_every="auto", **options)
    steps = logged(trainer, "l3m/constraint_step")
    assert steps[:4] == [1.0] * 4, "the warm-up"
    assert steps[16:] == [1.0] * 4, "the last fifth"
    assert set(steps[4:16]) == {0.0, 1.0}
    left_out = "".join(str(int(step)) for step in steps)
    assert "0" * MOST_LEFT_OUT in left_out
    assert "0" * (MOST_LEFT_OUT + 1) not in left_out
    own = sampled(recorder)
    assert [tokens > 0 for tokens in own] == [step == 1 for step in steps]
    assert logged(trainer, "l3m/sampled_tokens") == [sum(own[: i + 1]) for i in range(20)]
    assert trainer.constraint_data["general"].state()["taken"] == 4 * sum(steps), "its data are left out with the rest"
    optimizer = trainer.l3m_optimizer
    assert (optimizer.constraint_steps, optimizer.left_out) == (sum(steps), 20 - sum(steps))
    assert [value is None for value in logged(trainer, "l3m/truncated")] == [step == 0 for step in steps]
    bands = logged(trainer, "constraints/length/stderr")
    at = left_out.index("00", 4) + 1
    assert bands[at] > bands[at - 1], "what is not looked at is known less"
    assert trainer.average.n_averaged == 4


def test_what_is_not_comfortably_met_is_never_left_out(make_model, train):
    plain, _ = train(make_model(), max_steps=8)
    auto, _ = train(make_model(), max_steps=8, rollout_every="auto")
    assert logged(auto, "l3m/constraint_step") == [1.0] * 8
    assert_same_weights(auto.model, plain.model, 0.0)


def test_a_rollout_is_used_as_often_as_was_said(make_model, train):
    trainer, recorder = train(make_model(), max_steps=7, learning_rate=1e-4, rollout_reuse=3)
    assert [tokens > 0 for tokens in sampled(recorder)] == [True, False, False, True, False, False, True]
    assert logged(trainer, "l3m/constraint_step") == [1.0] * 7
    shares = logged(trainer, "l3m/ess")
    assert [share is None for share in shares] == [True, False, False, True, False, False, True]
    assert all(0.99 < share <= 1 for share in shares if share is not None), "the policy has hardly moved"
    assert trainer.prompts.state()["taken"] == 3 * 6
    bands = logged(trainer, "constraints/length/stderr")
    assert bands[2] > bands[1] > bands[0]
    assert trainer.l3m_optimizer.constraint_steps == 7
    assert [value is None for value in logged(trainer, "constraints/length/batch_mean")] == [
        s is not None for s in shares
    ]


def test_a_rollout_is_not_used_again_where_few_of_its_responses_would_count(make_model, train):
    trainer, recorder = train(make_model(num_hidden_layers=2), max_steps=6, learning_rate=0.5, rollout_reuse=6)
    own, shares = sampled(recorder), logged(trainer, "l3m/ess")
    low = [i for i, share in enumerate(shares) if share is not None and share < LEAST_SHARE]
    assert low
    assert all(own[i] > 0 for i in low)
    assert all(
        tokens > 0 for tokens, share in zip(own[1:], shares[1:], strict=True) if share is None or share < LEAST_SHARE
    )


def test_the_half_step_that_uses_a_rollout_again_is_the_one_by_hand(make_model, train, monkeypatch):
    """lambda / S (b - c_n) rho_n / (n |y|), at the weights of now, from responses of before."""
    found = []
    whole = constraint_step._backward

    def seen(trainer, responses, weights, **fresh):
        found.append((responses, weights.clone(), {k: v.clone() for k, v in trainer.policy.state_dict().items()}))
        whole(trainer, responses, weights, **fresh)

    monkeypatch.setattr(constraint_step, "_backward", seen)
    options = {"solver": "penalty", "penalty": 0.5, "max_steps": 2, "learning_rate": 0.02, "temperature": 1.5}
    train(make_model(), constraints=[l3ms.Length(max=2, scale=1.0)], rollout_reuse=2, **options)
    (first, plain, before), (again, weights, now) = found
    assert again is first
    ratio = []
    for state in (before, now):
        model = make_model().eval()
        model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
        with torch.no_grad():
            logits = model(input_ids=first.input_ids, attention_mask=first.attention_mask).logits[:, :-1] / 1.5
        targets = first.labels[:, 1:]
        token = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        ratio.append((token * (targets != -100)).sum(1))
    rho = (ratio[1] - ratio[0]).exp().clamp(max=2.0)
    assert (rho - 1).abs().max() > 0.02
    lengths = first.lengths.double()
    n = len(lengths)
    others = (lengths.sum() - lengths) / (n - 1)
    expected = 0.5 * (others - lengths) / n / lengths.mean()
    torch.testing.assert_close(plain.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights.double(), expected * rho, rtol=1e-4, atol=1e-6)


CASES = {
    "auto": {"rollout_every": "auto", "learning_rate": 0.01},
    "reuse": {"rollout_reuse": 4, "learning_rate": 0.01},
    "both": {"rollout_every": "auto", "rollout_reuse": 3, "learning_rate": 0.01},
}


@pytest.mark.parametrize("case", [c if c == "both" else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_run_that_is_resumed_is_the_one_that_was_not_interrupted(make_model, train, case):
    options = {"constraints": [EASY], "max_steps": 14, "save_strategy": "steps", "save_steps": 7, **CASES[case]}
    whole, _ = train(make_model(), **options)
    resumed, _ = train(make_model(), resume=f"{whole.args.output_dir}/checkpoint-7", **options)
    assert_same_weights(resumed.model, dict(whole.model.named_parameters()), 0.0)
    ours, theirs = timeless(resumed.state.log_history), timeless(whole.state.log_history)
    unlike = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    plain = [[{k: v for k, v in row.items() if k not in unlike} for row in log] for log in (ours, theirs)]
    assert plain[0] == plain[1]
    assert any("l3m/ess" in row for row in theirs[7:]) == (case != "auto")


def test_a_checkpoint_holds_the_rollout_that_is_to_be_used_again(make_model, train):
    trainer, _ = train(
        make_model(), max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-4, rollout_reuse=2
    )
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    assert (folder / "rollout.safetensors").exists()
    kept = load_tree(folder, "rollout")
    assert (kept["uses"], kept["rewards"].keys()) == (1, {"length"})
    (folder / "manifest.json").unlink()
    for wrong in ({"uses": 0}, {"rewards": {"length": [1.0]}}, {"input_ids": kept["input_ids"] + 17}, {"lengths": kept["lengths"] + 1},
                  {"log_likelihood": kept["log_likelihood"][1:]}):  # fmt: skip
        save_tree(folder, "rollout", {**kept, **wrong})
        with pytest.raises(ValueError, match="refused: ValueError: rollout: is no rollout of this model"):
            train(make_model(), max_steps=2, learning_rate=1e-4, rollout_reuse=2, resume=str(folder))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
@pytest.mark.parametrize(
    "where", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "trainable_token_indices": [3]}]
)
def test_it_is_read_beside_embeddings_with_adapters(make_model, tokenizer, tmp_path, where):
    import peft

    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **where))
    fewer = FewerSamples("1", 2)
    fewer.load_rollout(tmp_path, "", 1.0, model)
    assert fewer.kept is None
    responses = l3ms.Rollout.from_tokens(tokenizer, ["a"], [[3]], [l3ms.Response([4, 1], True)])
    fewer.kept = Kept(responses, {"length": [2.0]}, torch.zeros(1), uses=1)
    fewer.save_rollout(tmp_path, "")
    fewer.load_rollout(tmp_path, "", 1.0, model)
    assert fewer.kept.rewards == {"length": [2.0]}


def test_the_watch_sees_each_rollout_once(make_model, train, monkeypatch):
    """Its statistics are of responses that were sampled, and gradients are looked at in the next iteration that samples."""
    watch, looked = l3ms.Watch(every=2, held_out_every=0), []
    monkeypatch.setattr(watch, "_look_at_gradients", lambda trainer, seen: looked.append(trainer.state.global_step))
    trainer, recorder = train(make_model(), start=False, max_steps=7, learning_rate=1e-4, rollout_reuse=3)
    trainer.add_callback(watch)
    trainer.train()
    seen = [row["step"] for row in trainer.state.log_history if "watch/ended" in row]
    assert [i + 1 for i, tokens in enumerate(sampled(recorder)) if tokens] == seen == [1, 4, 7]
    assert looked == [4, 7], "for iterations 2 and 6"


def drawn_otherwise(monkeypatch, by=0.0, there=True):
    """The engine says of each token that it was exp(by) times as likely as the model says."""
    sample = constraint_step.rollout

    def rollout(model, *args, **options):
        responses = sample(model, *args, **options)
        if not there:
            object.__setattr__(responses, "engine_log_likelihood", None)
            return responses
        with torch.no_grad():
            logits = model(input_ids=responses.input_ids, attention_mask=responses.attention_mask).logits[:, :-1]
        targets = responses.labels[:, 1:]
        token = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] + by
        said = [row[mask].tolist() for row, mask in zip(token, targets != -100, strict=True)]
        object.__setattr__(responses, "engine_log_likelihood", said)
        return responses

    monkeypatch.setattr(constraint_step, "rollout", rollout)


def test_an_engine_that_is_the_model_changes_nothing(make_model, tokenizer, train, monkeypatch):
    plain, _ = train(make_model(), max_steps=3)
    drawn_otherwise(monkeypatch)
    weighted, _ = train(make_model(), max_steps=3, engine=Copying(tokenizer), rollout_importance="truncate")
    assert logged(weighted, "l3m/ess") == pytest.approx([1.0] * 3, abs=1e-6)
    assert_same_weights(weighted.model, plain.model, 1e-5)


def test_an_engine_that_is_another_is_weighed(make_model, tokenizer, train, monkeypatch):
    drawn_otherwise(monkeypatch, by=0.1)
    trainer, recorder = train(make_model(), max_steps=1, engine=Copying(tokenizer), rollout_importance="truncate")
    lengths = recorder.rollouts[0].lengths.double()
    rho = torch.exp(-0.1 * lengths)
    share = rho.sum() ** 2 / (len(rho) * rho.square().sum())
    assert logged(trainer, "l3m/ess") == pytest.approx([float(share)], rel=1e-4)
    others = (lengths.sum() - lengths) / (len(lengths) - 1)
    wanted = (others + rho * (lengths - others)).mean()
    assert logged(trainer, "constraints/length/estimate") == pytest.approx([float(wanted)], rel=1e-4)


def test_an_engine_without_numbers_cannot_be_weighed(make_model, tokenizer, train, monkeypatch):
    drawn_otherwise(monkeypatch, there=False)
    with pytest.raises(
        ValueError, match=r"'truncate' weighs responses by the log-likelihoods of the engine .* gives none"
    ):
        train(make_model(), engine=Copying(tokenizer), rollout_importance="truncate")


def test_the_policy_of_now_is_what_a_divergence_is_of(make_model, train, monkeypatch):
    """Of responses that are used again too: as they were, its sign would be that of where the policy has been."""
    given, now, backward = [], [], constraint_step._backward
    observe = l3ms.L3MOptimizer.observe

    def observed(self, rewards, *args, **options):
        given.append(rewards)
        return observe(self, rewards, *args, **options)

    def looked(trainer, responses, weights, *, fresh):
        now.append((fresh, trainer.constraints[0].measure(responses, trainer.policy)))
        backward(trainer, responses, weights, fresh=fresh)

    monkeypatch.setattr(l3ms.L3MOptimizer, "observe", observed)
    monkeypatch.setattr(constraint_step, "_backward", looked)
    constraints = [l3ms.KL(max=0.001), l3ms.Length(max=6)]
    train(make_model(), constraints=constraints, max_steps=3, learning_rate=0.005, rollout_reuse=3)
    assert [fresh for fresh, _ in now] == [True, False, False]
    for rewards, (_, wanted) in zip(given, now, strict=True):
        assert rewards["kl"] == pytest.approx(wanted)
        assert rewards["length"] == given[0]["length"]
    assert given[1]["kl"] != pytest.approx(given[0]["kl"])


DATA_ONLY = [l3ms.DataNLL("general", rows(8, seed=3), max=2.0, batch_size=4), l3ms.Length(name="seen", monitor=True)]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"rollout_every": "sometimes"}, "rollout_every must be 1 or 'auto', got 'sometimes'"),
        ({"rollout_reuse": 0}, "rollout_reuse must be greater than or equal to 1, got 0"),
        ({"rollout_importance": "all"}, "rollout_importance must be 'none' or 'truncate', got 'all'"),
        (
            {"rollout_importance": "truncate"},
            "rollout_importance='truncate' is for an engine whose probabilities are not",
        ),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a positive number, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"rollout_every": "auto", "solver": "none"}, "rollout_every must be left out with solver .none."),
        ({"rollout_importance": "truncate", "solver": "none"}, "rollout_importance must be left out with solver"),
        ({"rollout_every": "auto", "half_steps": "joint"}, "rollout_every needs half_steps: alternating, got 'joint'"),
        ({"rollout_reuse": 2, "half_steps": "joint"}, "rollout_reuse needs half_steps: alternating"),
        ({"rollout_reuse": 2, "smoothing": "0.1"}, "rollout_reuse needs smoothing: trend, got 0.1"),
        ({"rollout_every": "auto", "smoothing": "ema"}, "rollout_every needs smoothing: trend, got 'ema'"),
        ({"rollout_reuse": 2, "constraints": DATA_ONLY}, "rollout_reuse is about sampled responses, .* got 2"),
        ({"rollout_importance": "truncate", "constraints": DATA_ONLY}, "rollout_importance is about sampled responses"),
    ],
)
def test_what_makes_no_sense_together_is_refused(make_model, train, options, line):
    with pytest.raises(ValueError, match=line):
        train(make_model(), start=False, **options)


def test_data_alone_can_be_left_out(make_model, train):
    constraints = [l3ms.DataNLL("general", rows(8, seed=3), max=50.0, batch_size=4)]
    trainer, _ = train(make_model(), constraints=constraints, max_steps=10, rollout_every="auto", learning_rate=0.01)
    assert 0.0 in logged(trainer, "l3m/constraint_step")
    assert set(logged(trainer, "l3m/sampled_tokens")) == {0.0}


@pytest.mark.parametrize(
    "options", [pytest.param(CASES["auto"], marks=pytest.mark.slow), CASES["reuse"]], ids=["auto", "reuse"]
)
def test_monitors_change_nothing(make_model, train, options):
    found = []
    for more in ([], [l3ms.Length(name="seen", monitor=True), l3ms.KL(name="far", monitor=True)]):
        trainer, _ = train(make_model(), constraints=[EASY, *more], max_steps=9, **options)
        found.append((trainer, logged(trainer, "l3m/constraint_step"), logged(trainer, "l3m/sampled_tokens")))
    assert found[0][1:] == found[1][1:]
    assert_same_weights(found[1][0].model, found[0][0].model, 0.0)
    assert math.isfinite(found[1][0].l3m_optimizer.metrics()["constraints/seen/estimate"])
