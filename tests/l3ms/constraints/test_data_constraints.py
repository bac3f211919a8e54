"""`DataNLL` and `KL` against the model's own logits, in the trainer, and resumed."""

import copy
import math

import pytest
import torch
from training_runs import assert_same_weights, log_likelihood, rows
from transformers import AutoModelForCausalLM

import l3ms
from l3ms.measuring.evaluation import evaluate
from l3ms.model.averaging import trained
from l3ms.model.batches import Collator


def nll(model, data):
    with torch.no_grad():
        total, count = log_likelihood(model, Collator(0)(data))
    return (-total / count).tolist()


# ---- the loss on other data ----


def test_the_values_are_each_sequences_and_the_gradient_is_the_means(make_model):
    data = rows(6)
    data[2] = data[2] | {"labels": [-100] * len(data[2]["labels"])}  # nothing scored: left out
    model, plain = l3ms.fuse_head(make_model()), make_model()
    values = l3ms.sequence_nll(model, Collator(0)(data))
    kept = data[:2] + data[3:]
    assert values.tolist() == pytest.approx(nll(plain, kept), rel=1e-5)
    values.mean().backward()
    total, count = log_likelihood(plain, Collator(0)(kept))
    (-total / count).mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no label of the batch is scored"):
        l3ms.sequence_nll(model, Collator(0)([data[2]]))


def test_rows_are_taken_once_each_and_a_loader_in_its_own_order(make_model):
    data = rows(6)
    batches = l3ms.DataNLL("general", data, max=2.0, batch_size=4).batches(seed=1)
    seen = torch.cat([batches.take()["input_ids"].sum(1) for _ in range(3)])
    assert sorted(seen.tolist()) == sorted(2 * [sum(row["input_ids"]) for row in data])
    loader = [Collator(0)(data[:2]), Collator(0)(data[2:])]
    own = l3ms.DataNLL("general", loader, max=2.0)
    order = own.batches()
    taken = [order.take() for _ in range(3)]
    assert taken[0] is taken[2] is loader[0]
    again = own.batches()
    again.restore(order.state())
    assert again.take() is loader[1]
    torch_loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=Collator(0))  # type: ignore[arg-type]
    for source in (loader, torch_loader):
        found = l3ms.DataNLL("general", source, max=2.0).evaluate(l3ms.fuse_head(make_model()))
        assert found == pytest.approx(nll(make_model(), data), rel=1e-5)


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        ([], "loader is empty"),
        (3, "loader must be rows or an iterable of batches, got int"),
        (iter([1]), "loader must be something that can be gone through again"),
        ([{"input_ids": [1]}], "row 0 must hold input_ids and labels"),
        ([{"input_ids": [1, 2], "labels": [1]}], "row 0 must have one label per token, got 2 input_ids and 1 labels"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "row 0 has no scored token"),
    ],
)
def test_bad_data_is_named(loader, named):
    with pytest.raises(ValueError, match="constraint 'general': ") as error:
        l3ms.DataNLL("general", loader, max=2.0)
    assert named in str(error.value)
    with pytest.raises(ValueError, match="held_out"):
        l3ms.DataNLL("general", rows(2), max=2.0, held_out=[])


def test_an_iterable_without_batches_is_named():
    class Nothing:
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="has no batch: Nothing is empty"):
        l3ms.DataNLL("general", Nothing(), max=2.0).batches().take()


def test_a_half_step_on_data_by_hand(make_model, train):
    """One iteration, SGD, no sampling: the task's step, then clip(lambda grad C)."""
    other = rows(8, seed=3)
    constraint = l3ms.DataNLL("general", other, max=1.5, margin=0.0, batch_size=8)
    trainer, recorder = train(make_model(), constraints=(constraint,), max_steps=1, mu="paper")
    assert trainer.last_rollout is None
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in (recorder.batches[0], Collator(0)(other)):
        base.zero_grad()
        total, count = log_likelihood(model, batch)
        loss = -(total / count).mean()
        loss.backward()
        assert loss > 1.5  # violated: lambda > 1, so that the step is clipped to the largest norm
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        base.step()
    assert_same_weights(trainer.model, model, 2e-6)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["constraints/general/estimate"] == pytest.approx(loss.item(), rel=1e-5)
    values = torch.tensor(nll(trainer_before_the_second_step(make_model, recorder), other))
    assert entry["constraints/general/stderr"] == pytest.approx(values.std().item() / math.sqrt(8), rel=0.1)
    assert "l3m/truncated" not in entry


def trainer_before_the_second_step(make_model, recorder):
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    total, count = log_likelihood(model, recorder.batches[0])
    (-(total / count).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    base.step()
    return model


def test_sampled_and_data_constraints_share_one_half_step(make_model, train):
    """The gradient of both together is that of sum_i lambda_i C_i, each backward of its own divided by the one S."""
    constraints = (
        l3ms.Length(max=3, margin=0.0),
        l3ms.DataNLL("general", rows(8, seed=3), max=1.5, margin=0.0, batch_size=8),
    )
    trainer, recorder = train(make_model(), constraints=constraints, max_steps=1, mu="paper", max_grad_norm=1e9)
    out, batch = recorder.rollouts[0], Collator(0)(rows(8, seed=3))
    assert trainer.l3m_optimizer.constraint_steps == 1
    model = trainer_before_the_second_step_unclipped(make_model, recorder)
    total, _ = log_likelihood(model, {k: out[k] for k in ("input_ids", "attention_mask", "labels")})
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    lengths = out.lengths.double()
    advantage = ((lengths.sum() - lengths) / (len(lengths) - 1) - lengths) / 3 / len(lengths) / lengths.mean()
    likelihood, count = log_likelihood(model, batch)
    weighted = entry["constraints/length/lambda"] * -(advantage.float() * total).sum()
    (weighted + entry["constraints/general/lambda"] * -(likelihood / count).mean() / 1.5).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad  # type: ignore[operator]
    assert entry["constraints/length/lambda"] > 1 < entry["constraints/general/lambda"]
    assert_same_weights(trainer.model, model, 2e-5)


def trainer_before_the_second_step_unclipped(make_model, recorder):
    model = make_model()
    total, count = log_likelihood(model, recorder.batches[0])
    (-(total / count).mean()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad  # type: ignore[operator]
    model.zero_grad()
    return model


@pytest.mark.parametrize("form", ["rows", "loader"])
def test_a_resumed_run_goes_on_in_the_data_where_it_was(make_model, train, tmp_path, form):
    data = rows(10, seed=3)
    source = data if form == "rows" else torch.utils.data.DataLoader(data, batch_size=3, collate_fn=Collator(0))  # type: ignore[arg-type]
    options = {"constraints": (l3ms.DataNLL("general", source, max=1.5, batch_size=3),), "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 4}
    _, whole = train(make_model(), **options)
    _, resumed = train(make_model(), **options, resume=str(tmp_path / "checkpoint-4"))
    assert len(resumed.weights) == 2
    for ours, theirs in zip(resumed.weights, whole.weights[4:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluate_measures_held_out_data_and_the_divergence(make_model, tokenizer):
    model, data, held = make_model(vocab_size=17), rows(6), rows(5, seed=9)
    kl = l3ms.KL(max=1.0, reference=make_model(seed=1))
    constraints = [l3ms.DataNLL("general", data, max=2.0, held_out=held, batch_size=2), kl]
    found = evaluate(model, tokenizer, data, max_new_tokens=4, seed=0, constraints=constraints)
    assert found.rewards["general"] == pytest.approx(nll(make_model(), held), rel=1e-5)
    assert len(found.rewards["kl"]) == 6
    assert model.training is make_model().training


def test_a_divergence_per_token_is_divided_by_the_mean_length_of_all_responses(make_model, tokenizer):
    """Not by that of a batch of the evaluation: the mean of the values would depend on how they are cut."""
    other = make_model(seed=1)
    constraints = [
        l3ms.KL(max=1.0, name=name, reference=other, per_token=name == "token") for name in ("whole", "token")
    ]
    found = evaluate(
        make_model(), tokenizer, rows(10), max_new_tokens=12, seed=0, constraints=constraints, batch_size=3
    )
    means = {sum(found.lengths[start : start + 3]) for start in (0, 3, 6)}
    assert len(means) > 1
    whole, token = (sum(value for value in found.rewards[name] if value is not None) for name in ("whole", "token"))
    assert token / 10 == pytest.approx(whole / sum(found.lengths))


# ---- the loss on other data, above that of a reference ----


def adapted(model, seed=None):
    """With LoRA, which changes the model where a seed is given."""
    import peft

    found = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "lora" in name:
                    parameter.normal_()
    return found


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
@pytest.mark.parametrize("form", ["copy", "model", "folder", "adapters", "moved adapters"])
def test_a_relative_loss_is_the_difference_on_the_same_rows(make_model, tmp_path, form):
    """With the gradient of the loss itself, whichever form the reference has."""
    data, other = rows(6), make_model(seed=1)
    other.save_pretrained(tmp_path)
    given = {"model": other, "folder": tmp_path}.get(form)
    policy, start = make_model(), make_model()
    if "adapters" in form:
        seed = 5 if form == "moved adapters" else None
        policy, start = adapted(policy, seed), adapted(start, seed)
    l3ms.fuse_head(policy)
    constraint = l3ms.DataNLL("general", data, max=0.1, relative=True, reference=given, held_out=data[:5])
    constraint.prepare(policy)
    torch.manual_seed(7)
    with torch.no_grad():
        for _, parameter in trained(policy):
            parameter += 0.1 * torch.randn_like(parameter)
    policy.train()
    reference, plain = other if given is not None else start, copy.deepcopy(policy)
    expected = [now - before for now, before in zip(nll(policy, data), nll(reference, data), strict=True)]
    values = constraint.losses(policy, Collator(0)(data))
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 1e-3
    values.mean().backward()
    l3ms.sequence_nll(plain, Collator(0)(data)).mean().backward()
    for (name, ours), (_, theirs) in zip(trained(policy), trained(plain), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, msg=name)
    assert constraint.evaluate(policy) == pytest.approx(expected[:5], abs=1e-5)
    assert policy.training


def test_a_relative_half_step_is_that_of_the_loss_less_its_start(make_model, train):
    """Same bits as with the bound raised by the start's loss, where a batch is all rows and so its start is one number."""
    data = rows(8, seed=3)
    start = sum(nll(make_model(), data)) / 8
    options = {"margin": 0.0, "scale": 1.0, "batch_size": 8}
    found = [
        train(make_model(), constraints=(constraint,), max_steps=3, mu="paper", smoothing="ema")[0]
        for constraint in (
            l3ms.DataNLL("general", data, max=-0.2, relative=True, **options),
            l3ms.DataNLL("general", data, max=start - 0.2, **options),
        )
    ]
    assert_same_weights(found[0].model, found[1].model, 2e-6)
    logs = [[e for e in trainer.state.log_history if "loss" in e] for trainer in found]
    for relative, plain in zip(*logs, strict=True):
        estimates = [entry["constraints/general/estimate"] for entry in (relative, plain)]
        assert estimates[0] == pytest.approx(estimates[1] - start, abs=1e-5)
        assert relative["constraints/general/stderr"] < plain["constraints/general/stderr"]


def test_a_relative_loss_without_a_start_is_refused(make_model):
    constraint = l3ms.DataNLL("general", rows(4), max=0.1, relative=True)
    with pytest.raises(ValueError, match="constraint 'general': reference is missing: call prepare"):
        constraint.losses(l3ms.fuse_head(make_model()), Collator(0)(rows(4)))
    with pytest.raises(ValueError, match="constraint 'general': reference is what a relative loss is measured from"):
        l3ms.DataNLL("general", rows(4), max=0.1, reference="folder")


# ---- divergence from a reference ----


def ratio(policy, reference, out, temperature):
    batch = {name: out[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        return log_likelihood(policy, batch, temperature)[0] - log_likelihood(reference, batch, temperature)[0]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("form", ["model", "path"])
def test_the_value_is_the_log_ratio_at_the_temperature_of_the_sampling(
    make_model, tokenizer, tmp_path, form, per_token
):
    policy, other = make_model(seed=0), make_model(seed=1)
    other.save_pretrained(tmp_path)
    kl = l3ms.KL(max=1.0, reference=other if form == "model" else tmp_path, per_token=per_token, batch_size=4)
    out = l3ms.rollout(policy, tokenizer, ["a", "b c"] * 5, max_new_tokens=6, temperature=0.7)
    expected = ratio(policy, other, out, 0.7).double()
    if per_token:
        expected = expected / out.lengths.double().mean()
    assert out.rewards([kl], policy)["kl"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(expected.abs()) > 0.05
    with pytest.raises(ValueError, match="constraint 'kl' needs the model"):
        out.rewards([kl])


def test_without_a_reference_it_is_the_model_at_the_start(make_model, tokenizer, train):
    kl = l3ms.KL(max=10.0)
    with pytest.raises(ValueError, match="reference is missing: call prepare"):
        l3ms.rollout(make_model(), tokenizer, ["a"], max_new_tokens=2).rewards([kl], make_model())
    trainer, _ = train(make_model(), constraints=(kl,), max_steps=2)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["constraints/kl/estimate"] != 0
    out = l3ms.rollout(trainer.model, tokenizer, ["a", "b"], max_new_tokens=6)
    expected = ratio(trainer.model, make_model(), out, 1.0)
    assert out.rewards([kl], trainer.model)["kl"] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
@pytest.mark.parametrize("named", [True, False])
def test_with_adapters_the_reference_is_the_model_under_them(make_model, tokenizer, tmp_path, named):
    import peft

    make_model().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    l3ms.fuse_head(model)
    kl = l3ms.KL(max=1.0, reference=tmp_path if named else None)
    kl.prepare(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    out = l3ms.rollout(model, tokenizer, ["a", "b c"], max_new_tokens=6)
    found = out.rewards([kl], model)["kl"]
    assert found == pytest.approx(ratio(model, make_model(), out, 1.0).tolist(), abs=1e-4)
    assert max(map(abs, found)) > 1e-3  # type: ignore[arg-type]
    assert kl._reference.model is None
    with pytest.raises(ValueError, match="reference is the model without its adapters, but this one has none"):
        out.rewards([kl], make_model())


def test_a_reference_that_does_not_fit_is_named(make_model, tokenizer, tmp_path):
    out = l3ms.rollout(make_model(), tokenizer, ["a"], max_new_tokens=2)
    with pytest.raises(ValueError, match="vocabulary of 17 tokens, got 20"):
        out.rewards([l3ms.KL(max=1.0, reference=make_model(vocab_size=20))], make_model())
    with pytest.raises(ValueError, match="reference cannot be loaded from"):
        out.rewards([l3ms.KL(max=1.0, reference=tmp_path / "gone")], make_model())


def test_a_copy_shares_what_is_large(make_model):
    kl, data = l3ms.KL(max=1.0, reference=make_model()), l3ms.DataNLL("general", rows(3), max=1.0)
    assert copy.deepcopy(kl)._reference is kl._reference
    assert copy.deepcopy(data).loader is data.loader
