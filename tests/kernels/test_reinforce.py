"""The weights of `barrier_weights`, put through the head, give the gradient of the constraints.

A model so small that E[r] and its gradient are finite sums: a token has V values, a response two tokens, pi(y) = pi(y_1) pi(y_2 | y_1), and
the parameters are the logits of the first token and, for each first token, of the second.
"""

import itertools
import math

import pytest
import torch
from head_cases import WEIGHTED_BACKENDS, backends_of, grad_of
from torch import Tensor

from l3m_kernels import Bounds, barrier_weights, weighted_log_likelihood

VOCABULARY, BATCH, BATCHES = 3, 6, 3000
ALL = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))  # (V^2, 2) every response
# Two rewards of each response; the first is far from zero, so that a missing baseline shows in the variance.
REWARDS = torch.tensor(
    [
        [10.0, 0.3],
        [11.0, -1.0],
        [12.5, 0.0],
        [9.0, 2.0],
        [10.5, 0.5],
        [13.0, -0.7],
        [10.0, 1.0],
        [8.0, 0.2],
        [12.0, -2.0],
    ],
    dtype=torch.float64,
)
BOUNDS = Bounds.of(
    [(0, 1.0, 10.0, 5.0, 0.0, 0.0, 0.0), (0, -1.0, 8.0, 5.0, 0.0, 0.0, 0.0), (1, 1.0, 0.5, 2.0, 0.0, 0.0, 0.0)]
)
NORM = 4.0


def parameters() -> Tensor:
    """(1 + V, V) float64: the rows are what the head sees through a one-hot `hidden`."""
    return torch.randn(1 + VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def contexts(responses: Tensor) -> Tensor:
    """(2 n, 1 + V) the one-hot hidden state before each token of (n, 2) responses."""
    rows = torch.stack([torch.zeros_like(responses[:, 0]), 1 + responses[:, 0]], 1)
    return torch.nn.functional.one_hot(rows.flatten(), 1 + VOCABULARY).double()


def log_probability(theta: Tensor) -> Tensor:
    """(V^2,) of every response."""
    table = theta.log_softmax(1)
    return table[0, ALL[:, 0]] + table[1 + ALL[:, 0], ALL[:, 1]]


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("weights_backend", backends_of("barrier_weights"))
@pytest.mark.parametrize("backend", WEIGHTED_BACKENDS)
def test_gradient_of_the_constraints(backend, weights_backend, leave_one_out):
    theta = parameters().requires_grad_()
    probability = log_probability(theta).exp()
    expected_rewards = probability @ REWARDS  # (2,) exact
    mu = torch.tensor(0.3, dtype=torch.float64)
    # The averages stand at the truth, so that each batch has the multipliers of the exact problem.
    state = torch.tensor([[1.0, value, 1.0, 1.0, 0.0] for value in expected_rewards.tolist()], dtype=torch.float64)
    constraint = BOUNDS.table[:, 0] * (expected_rewards[BOUNDS.reward_index] - BOUNDS.table[:, 1]) / BOUNDS.table[:, 2]
    s = mu * mu
    lambdas = torch.where(constraint <= -s, mu / -constraint, mu / s * ((constraint + 2 * s) / s)).detach()
    share = lambdas.sum().clamp(min=1)
    (wanted,) = torch.autograd.grad((lambdas / share * constraint).sum() / NORM, theta)

    generator = torch.Generator().manual_seed(11)
    drawn = torch.multinomial(probability.detach(), BATCH * BATCHES, replacement=True, generator=generator)
    norm = torch.full((BATCH,), NORM, dtype=torch.float64)
    weights = []
    for batch in drawn.split(BATCH):
        options = {"smoothing": 1e-12, "norm": norm, "leave_one_out": leave_one_out, "backend": weights_backend}
        out = barrier_weights(REWARDS[batch], state, BOUNDS, mu, **options)
        weights.append(out.seq_weight)
    torch.testing.assert_close(out.multiplier, lambdas, rtol=1e-9, atol=0)
    seq_weight = torch.cat(weights)

    # The head: logits = hidden @ weight.T with hidden one-hot and weight = theta.T; one call gives the mean over the batches.
    weight = theta.detach().T.contiguous().requires_grad_()
    responses = ALL[drawn]
    cu_seqlens = torch.arange(0, 2 * len(drawn) + 1, 2)
    loss, _ = weighted_log_likelihood(
        contexts(responses), weight, responses.flatten(), seq_weight / BATCHES, cu_seqlens, backend=backend
    )
    loss.backward()
    found = grad_of(weight).T

    # Spread of the batches' own gradients, with the gradient of each response's log-likelihood written out.
    jacobian = torch.autograd.functional.jacobian(log_probability, theta.detach())  # (V^2, 1 + V, V)
    terms = -seq_weight.double()[:, None, None] * jacobian[drawn]
    batches = terms.view(BATCHES, BATCH, 1 + VOCABULARY, VOCABULARY).sum(1)
    torch.testing.assert_close(found, batches.mean(0), rtol=1e-6, atol=1e-9)
    error = batches.std(0) / math.sqrt(BATCHES)
    score = (found - wanted) / error
    assert score.abs().max() < 4.5, score
    assert score.square().mean() < 2.5
    assert wanted.abs().max() > 20 * error.max()  # the comparison can fail
