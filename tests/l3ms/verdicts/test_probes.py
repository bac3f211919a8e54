"""Probe gradients: those of the score function and of the loss, as autograd has them; sketches keep products."""

import types
from typing import Any

import pytest
import torch

import l3ms
from l3ms.config.run_config import ConfigError
from l3ms.verdicts import probes
from l3ms.verdicts.probes import Side, Sketch, _inactive, _nll, _parts, _score, _sides, _step, _trainable


@pytest.fixture
def subject(tokenizer, make_model):
    train = types.SimpleNamespace(batch_size=4, temperature=0.7, max_new_tokens=12)
    model = make_model(seed=1)
    l3ms.fuse_head(model)
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, config=types.SimpleNamespace(train=train))


def flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def log_likelihoods(model, batch, temperature=1.0):
    """(N,) by plain transformers."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1] / temperature
    labels = batch["labels"][:, 1:]
    token = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (token * (labels != -100)).sum(-1)


def test_the_gradient_of_a_mean_reward(subject):
    parameters = _trainable(subject.model)
    torch.manual_seed(0)
    responses = l3ms.rollout(
        subject.model, subject.tokenizer, ["a b", "c d e", "f"] * 3, max_new_tokens=12, temperature=0.7
    )
    values = [float(length) for length in responses.host_lengths]
    values[4] = None  # type: ignore[call-overload]
    found = flat(_score(subject, responses, values, factor=-0.5)).clone()

    given = [i for i in range(9) if i != 4]
    reward = torch.tensor([values[i] for i in given])
    others = (reward.sum() - reward) / 7  # the mean of the other ones
    loss = -0.5 * ((reward - others) * log_likelihoods(subject.model, responses, 0.7)[given]).mean()
    expected = flat(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_gradient_of_a_loss(subject):
    parameters = _trainable(subject.model)
    rows = [
        {"input_ids": [3, 4, 5, 6, 1], "labels": [-100, -100, 5, 6, 1]},
        {"input_ids": [7, 8, 1], "labels": [-100, 8, 1]},
    ]
    found = flat(_nll(subject, rows, factor=2.0)).clone()
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 6, 1], [7, 8, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 5, 6, 1], [-100, 8, 1, -100, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    loss = -2.0 * (log_likelihoods(subject.model, batch) / torch.tensor([3.0, 2.0])).mean()
    expected = flat(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert _parts([batch], 2) == [[rows[0]], [rows[1]]]


def test_sketches_keep_products(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(200, 100)), torch.nn.Parameter(torch.zeros(10_000))]
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(2))
    b = [x + 0.5 * y for x, y in zip(b, a, strict=True)]
    whole = Sketch(parameters)
    assert torch.equal(whole(a), flat(a))
    monkeypatch.setattr(probes, "EXACT_SIZE", 0)
    monkeypatch.setattr(probes, "SKETCH_SIZE", 4096)
    sketch = Sketch(parameters)
    assert sketch(a).shape == (4096,)
    norms = flat(a).norm() * flat(b).norm()
    assert abs(sketch(a) @ sketch(b) - flat(a) @ flat(b)) < 4 * norms / 4096**0.5
    assert sketch(a) @ sketch(b) > 0.3 * norms


@pytest.mark.parametrize(
    ("bounds", "threshold", "step"),
    [
        ({"max": 0.93}, 10, 0.07), ({"min": 0.03}, 10, 0.002), ({"min": 0.97}, 10, 0.1), ({"max": 0.99}, 10, 0.01),
        ({"max": 100}, None, 10.0), ({"min": 50}, None, 5.0),
    ],
)  # fmt: skip
def test_a_share_is_not_relaxed_beyond_0_and_1(bounds, threshold, step):
    item = l3ms.Length(threshold=threshold, **bounds)
    [side] = _sides(item)
    assert _step(side) == pytest.approx(step)
    relaxed = side.limit + side.sign * _step(side)
    assert threshold is None or 0 <= relaxed <= 1


@pytest.mark.parametrize(
    ("bounds", "mean", "active"),
    [
        ({"min": 40, "max": 50}, 42.0, ("min",)),
        ({"min": 40, "max": 50}, 39.0, ("min",)),
        ({"min": 40, "max": 50}, 45.0, ()),
        ({"min": 40, "max": 50}, 48.5, ("max",)),
        ({"max": 10}, 9.5, ("max",)),
        ({"max": 10}, 12.0, ("max",)),
        ({"max": 10}, 5.0, ()),
    ],
)
def test_which_bounds_bind(bounds, mean, active):
    item = l3ms.Length(**bounds)
    sides = [Side(item, sign, limit) for sign, limit in ((-1.0, item.min), (1.0, item.max)) if limit is not None]
    assert tuple(side.name for side in sides if not _inactive(side, mean, 0.0)) == active


def test_too_few_held_out_rows_are_refused_by_name_and_those_of_a_monitor_not_counted():
    def row(count):
        return [{"input_ids": [1, 2], "labels": [-100, 2]}] * count

    def subject(task, data, monitor=False) -> Any:
        bounds: dict[str, Any] = {"monitor": True} if monitor else {"max": 1.0}
        old = l3ms.DataNLL("old", row(5), held_out=row(data), **bounds)
        return types.SimpleNamespace(
            held_out=types.SimpleNamespace(rows=row(task)), constraints=[l3ms.Length(max=3), old]
        )

    enough = 2 * probes.BATCHES
    probes.check_prices(subject(enough, enough))
    probes.check_prices(subject(enough, 2, monitor=True))
    with pytest.raises(ConfigError, match=f"--prices: need at least {enough} held-out rows, got {enough - 1}"):
        probes.check_prices(subject(enough - 1, enough))
    with pytest.raises(ConfigError, match=f"--prices: need at least {enough} held-out rows of 'old', got {enough - 1}"):
        probes.check_prices(subject(enough, enough - 1))
