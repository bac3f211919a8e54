"""Prices: the quadratic programme against brute force, a policy whose multipliers are known in closed form, and the words."""

import itertools
import math

import numpy as np
import pytest

from l3ms.verdicts.prices import Price, Prices, cross_gram, nonnegative_least_squares, round_step, solve

# ---- the quadratic programme ----


def brute_force(gram, linear):
    """The best of the solutions on all subsets of the constraints."""
    count, best, found = len(linear), 0.0, np.zeros(len(linear))
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            part = list(subset)
            candidate = np.zeros(count)
            candidate[part] = -np.linalg.solve(gram[np.ix_(part, part)], linear[part])
            value = candidate @ gram @ candidate + 2 * linear @ candidate
            if candidate.min() >= 0 and value < best:
                best, found = value, candidate
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_active_set_finds_what_brute_force_finds(count):
    generator = np.random.default_rng(count)
    for _ in range(160 >> count):
        vectors = generator.normal(size=(count + 1, count + 4)) * np.exp(3 * generator.normal(size=(count + 1, 1)))
        gram = vectors[1:] @ vectors[1:].T
        linear = vectors[1:] @ vectors[0]
        found = nonnegative_least_squares(gram, linear)
        np.testing.assert_allclose(found, brute_force(gram, linear), rtol=1e-8, atol=1e-12 * np.abs(found).max())


def test_sixteen_constraints_meet_the_optimality_conditions():
    generator = np.random.default_rng(0)
    for _ in range(30):
        vectors = generator.normal(size=(17, 40))
        gram, linear = vectors[1:] @ vectors[1:].T, vectors[1:] @ vectors[0]
        found = nonnegative_least_squares(gram, linear)
        slope = gram @ found + linear
        assert found.min() >= 0
        assert slope.min() > -1e-9
        assert np.abs(slope[found > 0]).max(initial=0.0) < 1e-9


def test_a_constraint_that_was_taken_up_may_be_dropped_again():
    """The third looks useful at first; once the others are there, its multiplier would be -2."""
    vectors, task = np.array([[-3.0, -1, -1], [2, 0, 1], [0, -1, 1]]), np.array([0.0, 2, 0])
    gram, linear = vectors @ vectors.T, vectors @ task
    assert np.linalg.solve(gram, -linear)[2] < 0
    np.testing.assert_allclose(nonnegative_least_squares(gram, linear), [5 / 3, 7 / 3, 0], atol=1e-12)


def test_degenerate_problems():
    assert nonnegative_least_squares(np.zeros((0, 0)), np.zeros(0)).shape == (0,)
    assert nonnegative_least_squares(np.zeros((1, 1)), np.zeros(1)).tolist() == [0.0]
    twice = nonnegative_least_squares(np.ones((2, 2)), -np.ones(2))  # one constraint twice: their sum is what is known
    assert twice.sum() == pytest.approx(1.0)
    assert nonnegative_least_squares(np.ones((1, 1)), np.ones(1)).tolist() == [0.0]  # a bound that costs nothing


# ---- a categorical policy: min cross-entropy(q, pi) subject to E_pi[f_i] <= tau_i ----
# Stationarity in the logits is pi - q + sum_i lambda_i pi (f_i - E f_i) = 0, so for any pi and lambda
# q = pi (1 + sum_i lambda_i (f_i - E f_i)) makes pi the optimum and lambda its multipliers.

VALUES = np.arange(1.0, 13.0)
FEATURES = np.stack([VALUES / 6, (VALUES % 2 == 0).astype(float)])
POLICY = np.exp(-((VALUES - 5) ** 2) / 18) / np.exp(-((VALUES - 5) ** 2) / 18).sum()
MULTIPLIERS = np.array([0.5, 0.3])


def centred(policy):
    return FEATURES - (FEATURES @ policy)[:, None]


DATA = POLICY * (1 + MULTIPLIERS @ centred(POLICY))


def sampled(generator, batches, size, signs=(1.0, 1.0)):
    """(M, 3, 12) gradients in the logits: of the task from samples of the data, of the constraints by the score function."""
    found = np.empty((batches, 3, len(VALUES)))
    for m in range(batches):
        found[m, 0] = POLICY - np.bincount(generator.choice(12, size, p=DATA), minlength=12) / size
        actions = generator.choice(12, size, p=POLICY)
        for i in range(2):
            reward = signs[i] * FEATURES[i, actions]
            weight = (reward - reward.mean()) / (size - 1)
            found[m, 1 + i] = np.bincount(actions, weights=weight, minlength=12) - weight.sum() * POLICY
    return found


def products(gradients):
    flat = gradients.reshape(-1, gradients.shape[-1])
    return (flat @ flat.T).reshape(len(gradients), gradients.shape[1], len(gradients), gradients.shape[1])


def exact(multipliers_of=1.0):
    slopes = POLICY * centred(POLICY)
    return np.stack([POLICY - DATA, *(multipliers_of * slopes)])


def test_exact_gradients_give_the_multipliers():
    assert DATA.min() > 0
    assert DATA.sum() == pytest.approx(1)
    found = solve(products(np.repeat(exact()[None], 4, 0)))
    np.testing.assert_allclose(found.multipliers, MULTIPLIERS, rtol=1e-9)
    np.testing.assert_allclose(found.stderr, 0.0, atol=1e-12)
    assert found.residual < 1e-6


def test_the_price_is_what_relaxing_the_bound_brings():
    """The optimum for a slightly larger bound, by Newton's method on the multipliers of an exponential family of its own."""

    def optimum(bounds):
        # pi = q / (1 + lambda (f - tau)) has the mean tau: solve for lambda
        rates = MULTIPLIERS.copy()
        for _ in range(50):
            scale = 1 + rates @ (FEATURES - bounds[:, None])
            policy = DATA / scale
            gap = (FEATURES - bounds[:, None]) @ policy
            slope = -((FEATURES - bounds[:, None]) * (policy / scale)) @ (FEATURES - bounds[:, None]).T
            rates = rates - np.linalg.solve(slope, gap)
        policy = DATA / (1 + rates @ (FEATURES - bounds[:, None]))
        return -(DATA * np.log(policy)).sum(), policy

    start = FEATURES @ POLICY
    loss, policy = optimum(start)
    np.testing.assert_allclose(policy, POLICY, rtol=1e-9)
    for i in range(2):
        moved, _ = optimum(start + 1e-4 * np.eye(2)[i])
        assert (loss - moved) / 1e-4 == pytest.approx(MULTIPLIERS[i], rel=1e-2)


def test_sampled_gradients_give_the_multipliers_within_their_errors():
    generator = np.random.default_rng(1)
    z = []
    for _ in range(60):
        found = solve(products(sampled(generator, 16, 400)))
        z.append((found.multipliers - MULTIPLIERS) / found.stderr)
    z = np.array(z)
    assert np.abs(z.mean(0)).max() < 0.5  # no bias that matters
    assert 0.6 < z.std() < 1.6
    assert np.mean(np.abs(z) < 3) > 0.95


def test_noise_is_not_taken_for_gradient():
    """With the squares of noisy means for the Gram matrix the same probes make every price too small."""
    generator = np.random.default_rng(2)
    ours, naive = [], []
    for _ in range(60):
        gradients = sampled(generator, 16, 12)
        ours.append(solve(products(gradients)).multipliers)
        mean = gradients.mean(0)
        gram = mean @ mean.T
        naive.append(nonnegative_least_squares(gram[1:, 1:], gram[0, 1:]))
    naive = np.mean(naive, 0)
    ours = np.nanmean(ours, 0)
    assert abs(naive[1] - MULTIPLIERS[1]) > 2 * abs(ours[1] - MULTIPLIERS[1])


def test_cross_products_are_unbiased():
    generator = np.random.default_rng(3)
    truth = exact() @ exact().T
    found = np.mean([cross_gram(products(sampled(generator, 4, 20))) for _ in range(800)], 0)
    np.testing.assert_allclose(found, truth, atol=0.1 * np.abs(truth).max())


def test_a_bound_on_the_wrong_side_has_no_price():
    found = solve(products(sampled(np.random.default_rng(4), 16, 400, signs=(-1.0, 1.0))))
    assert found.multipliers[0] == 0
    assert found.multipliers[1] > 0


def test_what_cannot_be_told_from_noise_is_not_sold():
    generator = np.random.default_rng(5)
    gradients = generator.normal(size=(16, 2, 500))
    gradients[:, 0, 0] += 10  # a clear task, a constraint of pure noise
    found = solve(products(gradients))
    assert math.isnan(found.multipliers[0])
    assert found.residual == pytest.approx(1.0)
    gradients = generator.normal(size=(16, 2, 500))
    gradients[:, 1, 0] += 10
    assert math.isnan(solve(products(gradients)).residual)


# ---- the words ----


def price(**options):
    defaults = {"name": "length", "side": "max", "limit": 100.0, "unit": "tokens", "step": 10.0, "rate": 0.0012}
    return Price(**{**defaults, "stderr": 1e-4, "multiplier": 0.12, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            "length: allowing 10 more tokens (max 100 -> 110) would lower the task loss by about 0.012 nats (± 0.001, ",
        ),
        (
            {"side": "min", "limit": 40.0, "step": 5.0},
            "allowing 5 fewer tokens (min 40 -> 35) would lower the task loss by",
        ),
        ({"step": 1.0}, "allowing 1 more token (max 100 -> 101)"),
        (
            {"name": "polite", "unit": "", "side": "min", "limit": 0.8, "step": 0.1},
            "allowing 0.1 less (min 0.8 -> 0.7)",
        ),
        ({"rate": 1e-4}, "length <= 100: no price that stands out of the noise (0.0001 ± 0.0001 nats per token)"),
        ({"rate": math.nan}, "cannot be told from noise"),
        (
            {"inactive": "the mean, 60, is 40 away from it"},
            "length <= 100: the mean, 60, is 40 away from it; its price is 0",
        ),
    ],
)
def test_sentences(options, words):
    assert words in price(**options).sentence()


def test_the_residual_is_explained():
    assert "Residual 0.44" in Prices([price()], 0.44, 512, 16).sentences()[-1]
    assert "nothing to gain" in Prices([price()], math.nan, 512, 16).sentences()[-1]
    assert len(Prices([price(inactive="far")], math.nan, 512, 16).sentences()) == 1


@pytest.mark.parametrize(
    ("limit", "unit", "step"),
    [(100, 1, 10), (50, 1, 5), (9, 1, 1), (16, 1, 2), (0.8, 1, 0.1), (-3, 1, 0.2), (0, 2, 0.2), (0.93, 1, 0.1)],
)
def test_steps_are_round(limit, unit, step):
    assert round_step(limit, unit) == pytest.approx(step)
