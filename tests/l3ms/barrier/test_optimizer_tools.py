"""`L3MOptimizer` among the tools of a training loop: schedulers, GradScaler, accelerate, micro-batches."""

import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import l3ms

MU = l3ms.ExponentialDecay(0.5, 0.5, 1)


def policy(dtype=torch.float32, seed=0):
    """Hidden states of 8 prompts, and a head."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Parameter(torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype))
    hidden = torch.randn(8, 6, 5, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 7, (8, 6), generator=generator)
    for row in range(8):  # responses of 1 to 4 tokens
        labels[row, : 1 + row % 2] = -100
        labels[row, 2 + row % 2 + row % 4 :] = -100
    rewards = torch.randn(8, generator=generator, dtype=torch.float64)
    return head, hidden, labels, rewards


def make(head, base=None, **options):
    base = torch.optim.AdamW([head], lr=0.1) if base is None else base
    constraints = [l3ms.Constraint("r", min=0.5), l3ms.Length(max=2)]
    return l3ms.L3MOptimizer(base, constraints, **{"mu": MU, **options})


def iterate(opt, head, hidden, labels, rewards, scaler=None):
    lengths = (labels != -100).sum(1)
    for half in ("task", "constraint"):
        if half == "task":
            loss = l3ms.task_loss(hidden, head, labels)
        else:
            loss = opt.constraint_loss(hidden, head, labels, {"r": rewards, "length": lengths}).loss
        if scaler is None:
            loss.backward()
            opt.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        opt.zero_grad()


# ---- learning-rate schedulers ----


@pytest.mark.parametrize(
    ("make_scheduler", "rates"),
    [
        (lambda opt: lr_scheduler.LambdaLR(opt, lambda n: 1 / (n + 1)), [0.1, 0.05, 0.1 / 3, 0.025]),
        (
            lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4),
            [0.05 * (1 + math.cos(math.pi * n / 4)) for n in range(4)],
        ),
        (lambda opt: lr_scheduler.StepLR(opt, 2, 0.1), [0.1, 0.1, 0.01, 0.01]),
        (lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8), None),
    ],
    ids=["lambda", "cosine", "step", "one-cycle"],
)
def test_schedulers_take_it_and_tick_once_an_iteration(make_scheduler, rates):
    head, *batch = policy()
    opt = make(head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make_scheduler(opt)
        seen = []
        for _ in range(4):
            seen.append(opt.base.param_groups[0]["lr"])  # what the wrapped optimizer uses
            iterate(opt, head, *batch)
            scheduler.step()
    assert scheduler.last_epoch == 4
    if rates is None:  # the same as on a plain AdamW
        plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        reference, rates = make_scheduler(plain), []
        for _ in range(4):
            rates.append(plain.param_groups[0]["lr"])
            plain.step()
            reference.step()
        assert opt.param_groups[0]["betas"] == plain.param_groups[0]["betas"]  # OneCycle cycles the momentum too
    assert seen == pytest.approx(rates, rel=1e-12)


# ---- GradScaler ----


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-3, 1000.0])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.05, None])
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_losses_give_the_same_update(scale, unscale_first, max_grad_norm, fused):
    head, *batch = policy()
    other, *_ = policy()
    bases = (torch.optim.SGD([head], lr=0.1, fused=fused), torch.optim.SGD([other], lr=0.1))
    opt, plain = (make(b.param_groups[0]["params"][0], b, max_grad_norm=max_grad_norm) for b in bases)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    if unscale_first:
        step = scaler.step
        scaler.step = lambda optimizer: (scaler.unscale_(optimizer), step(optimizer))  # type: ignore[method-assign]
    for _ in range(3):
        iterate(opt, head, *batch, scaler=scaler)
        iterate(plain, other, *batch)
    torch.testing.assert_close(head, other, rtol=1e-5, atol=1e-6)
    assert opt.skipped_steps == 0
    assert opt.metrics() == pytest.approx(plain.metrics(), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_that_the_scaler_finds_is_a_skipped_step(fused):
    """mu, the estimates and the weights stay, the observation is dropped, and the next task step is a task step."""
    head, *batch = policy()
    opt = make(head, torch.optim.AdamW([head], lr=0.1, fused=fused), mu=l3ms.ExponentialDecay(1.0, 0.1, 10))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    iterate(opt, head, *batch, scaler=scaler)
    before, values = head.detach().clone(), opt.metrics()
    state = opt.estimates.state.clone()

    hidden, labels, rewards = batch
    loss = opt.constraint_loss(hidden, head, labels, {"r": rewards}).loss
    scaler.scale(loss).backward()
    assert head.grad is not None
    head.grad[0, 0] = math.inf
    scaler.step(opt)
    scaler.update()
    assert torch.equal(head, before)
    assert torch.equal(opt.estimates.state, state)
    assert opt.metrics()["l3m/mu"] == values["l3m/mu"]
    assert opt.metrics()["l3m/skipped_steps"] == 1
    assert scaler.get_scale() == 4.0
    opt.zero_grad()

    scaler.scale(l3ms.task_loss(hidden, head, labels)).backward()
    scaler.step(opt)
    scaler.update()
    assert opt.constraint_steps == 1
    assert not torch.equal(head, before)
    assert opt.metrics()["l3m/mu"] == values["l3m/mu"]


def test_what_the_scaler_found_counts_also_where_the_gradient_was_mended_since():
    """As on a rank whose own gradient is finite, or in a loop that replaces NaN after unscaling."""
    head, hidden, labels, _ = policy()
    opt, before = make(head), head.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(l3ms.task_loss(hidden, head, labels)).backward()
    assert head.grad is not None
    head.grad[0, 0] = math.inf
    scaler.unscale_(opt)
    head.grad.nan_to_num_(0.0, 0.0, 0.0)
    scaler.step(opt)
    scaler.update()
    assert torch.equal(head, before)
    assert opt.skipped_steps == 1


# ---- accelerate ----


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    head, *batch = policy()
    other, *_ = policy()
    module = torch.nn.ParameterList([head])
    opt, plain = make(head), make(other)
    scheduler = lr_scheduler.LambdaLR(opt, lambda n: 1 / (n + 1))
    accelerator = Accelerator(cpu=True)
    module, prepared, ticking = accelerator.prepare(module, opt, scheduler)
    assert type(prepared).__name__ == "AcceleratedOptimizer"
    assert prepared.optimizer is opt
    hidden, labels, rewards = batch
    for _ in range(2):
        plain.param_groups[0]["lr"] = prepared.param_groups[0]["lr"]
        iterate(plain, other, *batch)
        accelerator.backward(l3ms.task_loss(hidden, head, labels))
        prepared.step()
        prepared.zero_grad()
        rollout = {"r": rewards, "length": (labels != -100).sum(1)}
        accelerator.backward(opt.constraint_loss(hidden, head, labels, rollout).loss)
        prepared.step()
        ticking.step()
        prepared.zero_grad()
    assert torch.equal(head, other)
    assert prepared.optimizer.metrics() == plain.metrics()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 / 3)
    prepared.load_state_dict(prepared.state_dict())
    assert opt.constraint_steps == 2


# ---- micro-batches ----


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sizes", [(1,) * 8, (4, 4), (5, 3), (1, 7)])
@pytest.mark.parametrize("length_norm", ["mean", "sequence"])
def test_one_observation_sliced_into_micro_batches_is_one_batch(dtype, tolerance, sizes, length_norm):
    head, hidden, labels, rewards = policy(dtype)
    whole, *_ = policy(dtype)
    values = {"r": rewards, "length": (labels != -100).sum(1)}
    sgd = torch.optim.SGD([head], lr=0.3), torch.optim.SGD([whole], lr=0.3)
    split_opt, whole_opt = (make(p, b, length_norm=length_norm) for p, b in zip((head, whole), sgd, strict=True))
    for _ in range(2):
        whole_opt.constraint_loss(hidden, whole, labels, values).loss.backward()
        whole_opt.step()
        whole_opt.zero_grad()

        weights = split_opt.observe(values, values["length"])
        losses = 0.0
        for part, seq_weight in zip(
            zip(hidden.split(sizes), labels.split(sizes), strict=True), weights.split(sizes), strict=True
        ):
            out = split_opt.constraint_loss(part[0], head, part[1], seq_weight=seq_weight)
            assert torch.equal(out.seq_weight, seq_weight)
            out.loss.backward()
            losses += out.loss.item()
        split_opt.step()
        split_opt.zero_grad()
    start, *_ = policy(dtype)
    assert (whole - start).abs().max() > 1e-2
    torch.testing.assert_close(head, whole, rtol=tolerance, atol=tolerance)
    assert torch.equal(split_opt.estimates.state, whole_opt.estimates.state)


def test_constraint_loss_is_observe_and_the_weighted_head():
    head, hidden, labels, rewards = policy(torch.float64)
    opt, other = make(head), make(head)
    values = {"r": rewards, "length": (labels != -100).sum(1)}
    out = opt.constraint_loss(hidden, head, labels, values, temperature=0.7)
    weights = other.observe(values, values["length"])
    assert torch.equal(out.seq_weight, weights)
    logits = (hidden @ head.T / 0.7).log_softmax(-1)[:, :-1]
    token = logits.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0] * (labels[:, 1:] != -100)
    torch.testing.assert_close(out.log_likelihood.sequence, token.sum(1))
    torch.testing.assert_close(out.loss, -(weights.double() * token.sum(1)).sum())
    scored = int((labels[:, 1:] != -100).sum())
    given = opt.constraint_loss(hidden, head, labels, seq_weight=weights, temperature=0.7, scored=scored)
    assert torch.equal(given.loss, out.loss)
    with pytest.raises(ValueError, match="either rewards or seq_weight"):
        opt.constraint_loss(hidden, head, labels)
    with pytest.raises(ValueError, match="either rewards or seq_weight"):
        opt.constraint_loss(hidden, head, labels, values, seq_weight=weights)


def test_constraint_loss_of_a_packed_batch():
    head, hidden, labels, rewards = policy(torch.float64)
    opt, other = make(head), make(head)
    padded = opt.constraint_loss(hidden, head, labels, {"r": rewards})
    keep = torch.ones(8, 6, dtype=torch.bool)
    keep[:, 5] = False  # padding of every row but the longest ones
    keep[(labels[:, 5] != -100)] = True
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    packed = other.constraint_loss(hidden[keep], head, labels[keep], {"r": rewards}, cu_seqlens=cu_seqlens)
    assert torch.equal(packed.seq_weight, padded.seq_weight)
    torch.testing.assert_close(packed.loss, padded.loss)
