"""Cosines of constraint gradients: against gradients written out by hand, known cosines, and a problem without a feasible point."""

import math

import pytest
import torch

import l3ms
from l3ms.watching.gradient_cosines import SKETCH, PairCosines, group_weights, reward_gradients, sketch


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_a_sketch_keeps_inner_products():
    shapes = [torch.Size(shape) for shape in ((700, 300), (33,), (5, 7, 3))]
    draw = generator(0)
    first = [torch.randn(shape, generator=draw) for shape in shapes]
    other = [torch.randn(shape, generator=draw) for shape in shapes]
    second = [0.6 * a - 0.8 * b for a, b in zip(first, other, strict=True)]
    exact = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    norms = math.prod(math.sqrt(sum(float(g.square().sum()) for g in gs)) for gs in (first, second))
    left, right = sketch(first, shapes), sketch(second, shapes)
    assert left.shape == (SKETCH,)
    assert float(left @ right) == pytest.approx(exact, abs=4 * norms / math.sqrt(SKETCH))
    assert torch.equal(
        sketch([first[0], None, first[2]], shapes), sketch([first[0], torch.zeros(33), first[2]], shapes)
    )
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        sketch([None], shapes[:1])


def test_weights_of_a_group_have_the_others_as_baseline():
    rewards = [1.0, 4.0, 7.0, None, 2.0, math.nan]
    (first, ours), (second, theirs) = group_weights(rewards, 2)
    assert (first, second) == (slice(0, 3), slice(3, 6))
    by_hand = [(r - sum(x for x in (1, 4, 7) if x != r) / 2) / 3 for r in (1, 4, 7)]
    assert ours.tolist() == pytest.approx(by_hand)
    assert theirs.tolist() == [0, 0, 0]  # a single value has no baseline


@pytest.mark.parametrize("batch_size", [2, 8])
def test_gradients_are_those_of_the_mean_rewards(make_model, tokenizer, batch_size):
    model = make_model()
    l3ms.fuse_head(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.train()
    torch.manual_seed(0)
    responses = l3ms.rollout(model, tokenizer, ["a b", "c", "d e f", "a"] * 2, max_new_tokens=6, temperature=0.7)
    rewards = [[float(n) for n in responses.host_lengths], [float(i % 3) for i in range(8)]]
    state = torch.get_rng_state()
    found = reward_gradients(model, responses, rewards, temperature=0.7, groups=2, batch_size=batch_size)
    assert found is not None
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())

    logits = model(input_ids=responses.input_ids, attention_mask=responses.attention_mask).logits[:, :-1] / 0.7
    targets = responses.labels[:, 1:]
    token = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    trained = [p for p in model.parameters() if p.requires_grad]
    shapes = [p.shape for p in trained]
    for r, values in enumerate(rewards):
        for part, weights in group_weights(values, 2):
            gradient = torch.autograd.grad(
                (weights * token.sum(1)[part]).sum(), trained, retain_graph=True, allow_unused=True
            )
            expected = sketch(gradient, shapes)
            torch.testing.assert_close(found[r, part.start // 4], expected, rtol=1e-4, atol=1e-5)


def test_too_few_responses_give_no_gradient(make_model, tokenizer):
    model = make_model()
    l3ms.fuse_head(model)
    responses = l3ms.rollout(model, tokenizer, ["a", "b", "c"], max_new_tokens=2)
    assert reward_gradients(model, responses, [[1.0, 2.0, 3.0]]) is None


def noisy(cosine, noise, seed, dimension=200, groups=4):
    """Two gradients of norm 1 with that cosine in `groups` groups, whose noise (of norm `noise`) the two share."""
    truth = torch.zeros(2, 1, dimension)
    truth[0, 0, 0], truth[1, 0, 0], truth[1, 0, 1] = 1.0, cosine, math.sqrt(1 - cosine**2)
    shared = torch.randn(1, groups, dimension, generator=generator(seed)) * noise / math.sqrt(dimension)
    return truth + shared


def test_cosines_are_free_of_noise_that_both_share_and_their_errors_are_honest():
    scores, values = [], []
    for trial in range(150):
        pairs = PairCosines(2)
        for evaluation in range(4):
            pairs.add(noisy(-0.7, 1.5, 10 * trial + evaluation))
        found = pairs.cosine(0, 1)
        assert found is not None
        values.append(found.value)
        scores.append((found.value + 0.7) / found.stderr)
    gradient = noisy(-0.7, 1.5, 0).mean(1)
    plain = torch.cosine_similarity(gradient[0], gradient[1], dim=0)
    assert plain > -0.5, "the noise should have hidden the conflict from a plain cosine"
    assert sum(values) / len(values) == pytest.approx(-0.7, abs=0.02)
    assert sum(abs(score) < 2 for score in scores) / len(scores) > 0.9
    assert max(abs(score) for score in scores) < 5


def test_old_evaluations_go_and_noise_alone_is_no_cosine():
    pairs = PairCosines(2, evaluations=2)
    pairs.add(noisy(0.9, 0.1, 0))
    for seed in (1, 2):
        pairs.add(noisy(-0.9, 0.1, seed))
    found = pairs.cosine(0, 1)
    assert found is not None
    assert found.value == pytest.approx(-0.9, abs=0.02)
    only_noise = PairCosines(2)
    only_noise.add(torch.randn(2, 4, 300, generator=generator(3)))
    found = only_noise.cosine(0, 1)
    assert found is None or abs(found.value) < 3 * found.stderr


def test_infeasible_pair_on_a_categorical_policy_reaches_the_least_violation():
    """x <= -1 and x >= 1 over x in {-2..2}: the mean settles at 0, the gradients of x - (-1) and 1 - x are opposite."""
    support = torch.arange(-2.0, 3.0)
    logits = torch.nn.Parameter(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0]))  # starts at -1.2, within the first bound
    both = [l3ms.Constraint("low", max=-1.0), l3ms.Constraint("high", min=1.0)]
    opt = l3ms.L3MOptimizer(torch.optim.SGD([logits], lr=0.1), both, mu=l3ms.ExponentialDecay(1.0, 0.3, 150))
    draw, pairs = generator(0), PairCosines(2)
    for step in range(300):
        sampled = torch.multinomial(logits.detach().softmax(0), 64, replacement=True, generator=draw)
        x, chances = support[sampled], logits.log_softmax(0)[sampled]
        weights = opt.observe({"low": x.tolist(), "high": x.tolist()})
        (-(weights * chances).sum()).backward()
        opt.step()
        opt.zero_grad()
        if step % 25 == 24:
            parts = [
                torch.autograd.grad((w * logits.log_softmax(0)[sampled][part]).sum(), logits)[0]
                for part, w in group_weights(x.tolist(), 4)
            ]
            pairs.add(torch.stack([torch.stack(parts), torch.stack(parts)]))
    assert float((logits.detach().softmax(0) * support).sum()) == pytest.approx(0.0, abs=0.25)
    found = pairs.cosine(0, 1)
    assert found is not None
    assert -found.value == pytest.approx(-1.0)  # bounds of opposite sides: the sign turns
