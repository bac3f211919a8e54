"""Random arguments of `barrier_weights`, and how bits are compared: for the backends that promise the reference's."""

import torch

from l3m_kernels import initial_state, reference


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits, with all NaNs alike."""
    integers = tensor.reshape(-1).view(torch.int64 if tensor.dtype == torch.float64 else torch.int32).clone()
    integers[tensor.reshape(-1).isnan()] = -1
    return integers


def fresh_state(rewards: torch.Tensor, smoothing: float | None, device: str = "cpu") -> torch.Tensor:
    """That of a moving average, or of the filter where there is no smoothing."""
    return initial_state(rewards.shape[1], device, "trend" if smoothing is None else smoothing)


def random_problem(seed: int) -> tuple:
    """Arguments of barrier_weights but `state`: any sizes, also none, magnitudes, missing and constant rewards."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    N, R, K = integer(0, 40), integer(1, 5), integer(0, 7)
    rewards = torch.randn(N, R, dtype=torch.float64, generator=generator) * 10.0 ** integer(-3, 4)
    if seed % 3 == 0:
        rewards = rewards.round()
    if seed % 4 == 0:
        rewards[uniform(N, R) < 0.4] = torch.nan
    if seed % 5 == 0:
        rewards[:, 0] = 3.1
    sums = reference.reward_sums(torch.cat([rewards, rewards + 1])) if seed % 2 else None
    sign = torch.randint(0, 2, (K,), generator=generator) * 2.0 - 1.0
    margin_max = uniform(K).where(uniform(K) < 0.5, torch.inf)
    columns = [sign, uniform(K) * 6 - 3, uniform(K) * 4 + 0.1, uniform(K), uniform(K) * 3, margin_max]
    mu = 10.0 ** (-6 * uniform())
    norm = torch.randint(1, 100, (N,), generator=generator).double()
    index = torch.randint(0, R, (K,), generator=generator)
    if seed % 6 == 0:
        norm[uniform(N) < 0.2] = 0.0
    return (
        rewards,
        norm,
        sums,
        index,
        torch.stack(columns, 1),
        mu,
        mu * mu,
        None if seed % 3 == 1 else float(uniform()) * 0.99 + 0.01,
        seed % 7 > 0,
    )
