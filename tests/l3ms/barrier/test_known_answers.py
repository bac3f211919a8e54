"""Every kind of constraint on a policy over a few responses, whose constrained optimum is found independently, with exact gradients.

The policy is a softmax over K responses. "Samples" are its quantiles, so that they carry the policy to 1 in N and no noise: tested is
the way from the responses through the rewards to the multipliers and the gradient.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from classifiers import classifier
from torch import Tensor

import l3ms
from l3m_kernels import relaxed_log_barrier
from l3ms.model.batches import Collator

TEXTS = ["a", "a b", "c d", "e e e", "f ( )", "def name a b c"]
LENGTHS = [1, 2, 2, 3, 3, 5]
TASK = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.2, 0.3], dtype=torch.float64)
MU = 0.05


def optimum(task: Tensor, value: Callable[[Tensor], Tensor], constraint: l3ms.Constraint) -> Tensor:
    """The p that minimises -sum q log p and the barrier of `value(p)`, by a quasi-Newton method on exact gradients."""
    logits = task.log().clone().requires_grad_()
    search = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    mu = torch.tensor(MU, dtype=torch.float64)

    def objective():
        search.zero_grad()
        p = logits.softmax(0)
        total = -(task * p.log()).sum()
        for _, sign, bound, unit, *_ in constraint.rows(0):
            total = total + relaxed_log_barrier((sign * (value(p) - bound) / unit)[None], mu).sum()
        total.backward()
        return total

    search.step(objective)
    return logits.detach().softmax(0)


def quantiles(p: Tensor, count: int) -> Tensor:
    points = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.searchsorted(p.detach().double().cumsum(0), points).clamp(max=len(p) - 1)


def responses(picks: Tensor, *, tokens: bool = False) -> l3ms.Rollout:
    """Of the outcomes `picks`, with the lengths of their texts; with `tokens` each is one token to the model too."""
    chosen = picks.tolist()
    ids = torch.stack([torch.zeros_like(picks), picks], dim=1)
    return l3ms.Rollout(
        prompts=[""] * len(chosen),
        completions=[TEXTS[n % len(TEXTS)] for n in chosen],
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.stack([torch.full_like(picks, -100), picks], dim=1),
        lengths=torch.tensor([1 if tokens else LENGTHS[n % len(TEXTS)] for n in chosen]),
        ended=picks % 2 == 1,
    )


def optimizer(parameter: Tensor, constraint: l3ms.Constraint, steps: int, most=1.0, least=0.05) -> tuple[Any, Any]:
    """And the schedule of its learning rate, from `most` to `least`."""
    opt = l3ms.L3MOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [constraint],
        mu=l3ms.ExponentialDecay(1.0, MU, steps=steps // 2),
        smoothing=1.0,
        max_grad_norm=5.0,
    )
    return opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda n: max(least, most * 0.97**n))


def numbers(prompts, completions, **columns):
    return [float(2 * TEXTS.index(text)) for text in completions]


async def numbers_later(prompts, completions, **columns):
    return numbers(prompts, completions)


READY = l3ms.rewards
KINDS = {
    "function": l3ms.Constraint("x", numbers, max=5.0, margin=0.0),
    "asynchronous": l3ms.Constraint("x", numbers_later, max=5.0, margin=0.0),
    "two sides": l3ms.Constraint("x", numbers, min=4.0, max=5.0, margin=0.0),
    "chance": l3ms.Constraint("x", numbers, threshold=6.0, max=0.3, margin=0.0),
    "length": l3ms.Length(max=2.2, margin=0.0, name="x"),
    "length chance": l3ms.Length(threshold=3, max=0.25, margin=0.0, name="x"),
    "quantile": l3ms.Constraint("x", numbers, quantile=0.3, min=8.0, margin=0.0),
    "length quantile": l3ms.Length(quantile=0.6, max=2, margin=0.0, name="x"),
    "ends_with_eos": l3ms.Constraint("x", READY.ends_with_eos, min=0.8, margin=0.0),
    "matches": l3ms.Constraint("x", READY.matches("^a"), min=0.5, margin=0.0),
    "contains": l3ms.Constraint("x", READY.contains(["c", "d"]), min=0.6, margin=0.0),
    "avoids": l3ms.Constraint("x", READY.avoids(["a"]), min=0.9, margin=0.0),
    "ends_with": l3ms.Constraint("x", READY.ends_with("b"), min=0.4, margin=0.0),
    "distinct_n": l3ms.Constraint("x", READY.distinct_n(1), min=0.97, margin=0.0, scale=0.2),
    "readability": l3ms.Constraint("x", READY.readability, min=120.0, margin=0.0, scale=2.0),
}


# A half of the ready-made rewards: those that take longest, or are another one's complement.
REPEATS = ("matches", "avoids", "readability", "length chance", "length quantile", "asynchronous", "contains")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in REPEATS)) for kind in (*KINDS, "reward_model")],
)
def test_a_policy_ends_at_the_constrained_optimum(kind, tokenizer):
    count, steps = (200, 120) if kind != "reward_model" else (100, 80)
    if kind == "reward_model":
        model = classifier(pad_token_id=0)
        constraint = l3ms.RewardModel(
            "x", model, tokenizer=tokenizer, squash="sigmoid", batch_size=100, min=0.0, margin=0.0
        )
    else:
        constraint = KINDS[kind]
    each = constraint.measure(responses(torch.arange(len(TEXTS))))
    reward = torch.tensor([0.0 if value is None else value for value in each], dtype=torch.float64)
    if kind == "reward_model":  # the bound in the middle of what the task gives and the best response
        middle = 0.5 * float((TASK * reward).sum() + reward.max())
        options: dict[str, Any] = {"tokenizer": tokenizer, "squash": "sigmoid", "batch_size": 100, "scale": 0.2}
        constraint = l3ms.RewardModel("x", model, min=middle, margin=0.0, **options)
    before = float((TASK * reward).sum())
    assert (constraint.low or -1e9) > before or (constraint.high or 1e9) < before, "the task alone must violate it"

    logits = torch.nn.Parameter(TASK.log())
    opt, rate = optimizer(logits, constraint, steps)
    for _ in range(steps):
        (-(TASK * logits.log_softmax(0)).sum()).backward()
        opt.step()
        opt.zero_grad()
        picks = quantiles(logits.softmax(0), count)
        weights = opt.observe(responses(picks).rewards([constraint]))
        (-(weights.double() * logits.log_softmax(0)[picks]).sum()).backward()
        opt.step()
        opt.zero_grad()
        rate.step()
    p, best = logits.detach().softmax(0), optimum(TASK, lambda p: (p * reward).sum(), constraint)
    assert torch.allclose(p, best, atol=0.02), (p, best)
    value, metrics = float((p * reward).sum()), opt.metrics()
    assert (best - TASK).abs().max() > 0.05  # the constraint costs something
    slack = min(sign * (bound - value) / unit for _, sign, bound, unit, *_ in constraint.rows(0))
    assert slack > 0
    assert metrics["constraints/x/slack"] == pytest.approx(slack, abs=0.02)


def categorical(make_model, start: Tensor):
    """A language model whose next token does not depend on anything: softmax of the head's bias."""
    model = make_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(start.float().clone())
    model.requires_grad_(False)
    model.lm_head.bias.requires_grad_()
    l3ms.fuse_head(model)
    return model, model.lm_head.bias


def distribution(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.2 * torch.randn(17, generator=generator, dtype=torch.float64)).softmax(0)


@pytest.mark.slow  # about 10 s of one core: the log-ratios take three passes of 400 responses per step
def test_a_divergence_is_held_at_its_bound(make_model):
    task, start = distribution(0), distribution(1)
    model, bias = categorical(make_model, start.log())
    constraint = l3ms.KL(max=0.3, margin=0.0)
    constraint.prepare(model)
    assert float((task * (task / start).log()).sum()) > 0.6  # where the task alone would end
    opt, rate = optimizer(bias, constraint, 120, most=5.0, least=0.2)
    for _ in range(120):
        (-(task * bias.double().log_softmax(0)).sum()).backward()
        opt.step()
        opt.zero_grad()
        out = responses(quantiles(bias.double().softmax(0), 400), tokens=True)
        weights = opt.observe(out.rewards([constraint], model))
        inputs = {name: out[name] for name in ("input_ids", "attention_mask", "labels")}
        model(**inputs, seq_weight=weights, use_cache=False).loss.backward()
        opt.step()
        opt.zero_grad()
        rate.step()
    p = bias.detach().double().softmax(0)
    best = optimum(task, lambda p: (p * (p / start).log()).sum(), constraint)
    assert torch.allclose(p, best, atol=0.02), (p, best)
    divergence = float((p * (p / start).log()).sum())
    assert 0.2 < divergence < 0.3
    assert opt.metrics()["constraints/kl/estimate"] == pytest.approx(divergence, abs=0.02)


def test_a_loss_on_other_data_is_held_at_its_bound(make_model):
    """min CE(q1, p) with CE(q2, p) <= tau: p is the mixture (q1 + lambda q2) / (1 + lambda)."""
    counts = torch.tensor([1, 1, 9, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 13])
    other, task = counts.double() / counts.sum(), distribution(0)
    model, bias = categorical(make_model, task.log())
    rows = [{"input_ids": [0, n], "labels": [-100, n]} for n, k in enumerate(counts.tolist()) for _ in range(k)]
    least, without = -float((other * other.log()).sum()), -float((other * task.log()).sum())
    constraint = l3ms.DataNLL("other", rows, max=0.5 * (least + without), margin=0.0, batch_size=len(rows))
    opt, rate = optimizer(bias, constraint, 160, most=10.0, least=0.1)
    batch = Collator(0)(rows)
    for _ in range(160):
        (-(task * bias.double().log_softmax(0)).sum()).backward()
        opt.step()
        opt.zero_grad()
        opt.barrier_loss({"other": l3ms.sequence_nll(model, batch)}).backward()
        opt.step()
        opt.zero_grad()
        rate.step()
    p, metrics = bias.detach().double().softmax(0), opt.metrics()
    multiplier = metrics["constraints/other/lambda"] / constraint.unit
    assert torch.allclose(p, (task + multiplier * other) / (1 + multiplier), atol=3e-3)
    assert torch.allclose(p, optimum(task, lambda p: -(other * p.log()).sum(), constraint), atol=3e-3)
    assert multiplier > 0.1
    assert least < -float((other * p.log()).sum()) < constraint.max  # type: ignore[operator]
