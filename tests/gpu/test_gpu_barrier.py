"""barrier_weights on the device, one launch: against the reference on the CPU, whose sums are in the same order."""

import pytest
import torch
from barrier_problems import bits, fresh_state, random_problem
from head_on_gpu import DEVICE, MISSING, backends_with

from l3m_kernels import reference
from l3m_kernels.backends import select

BACKENDS = backends_with("barrier_weights")
backends = pytest.mark.parametrize("backend", BACKENDS)
FUSED = [name for name in BACKENDS if name != "reference"]
FIELDS = reference.BarrierWeights._fields


def moved(arguments) -> list:
    return [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in arguments]


@backends
@pytest.mark.parametrize("seed", range(200))
def test_the_reference_over_steps(seed, backend):
    """Bit-equal but where torch's square root on a CPU is an ulp off; the reference's sums on a GPU have an order of their own."""
    run = select("barrier_weights", backend, DEVICE)
    rewards, norm, sums, *rest = random_problem(seed)
    if backend == "reference" and sums is None:
        sums = reference.reward_sums(rewards)
    state = fresh_state(rewards, rest[-2])
    for _ in range(3):
        expected = reference.barrier_weights(rewards, norm, sums, state, *rest)
        actual = run(*moved((rewards, norm, sums, state, *rest)))
        for field, mine, right in zip(FIELDS, actual, expected, strict=True):
            mine = mine.cpu()
            assert (mine.shape, mine.dtype) == (right.shape, right.dtype), field
            if not torch.equal(bits(mine), bits(right)):
                tolerance = 1e-6 if field == "seq_weight" else 1e-13
                torch.testing.assert_close(mine, right, rtol=tolerance, atol=0, equal_nan=True)
        state = expected[-1]
        rewards, sums = rewards.flip(0) * 1.1, None if sums is None else sums * 0.9


@pytest.mark.parametrize("backend", FUSED or [MISSING])
def test_one_launch(backend):
    """Of a kernel of ours: the profiler counts what ran on the device."""
    run = select("barrier_weights", backend, DEVICE)
    rewards, norm, _, *rest = random_problem(1)
    arguments = moved((rewards, norm, None, fresh_state(rewards, rest[-2]), *rest))
    run(*arguments)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run(*arguments)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or ()]
    assert len([name for name in names if "barrier_weights_kernel" in name]) == 1, names


@pytest.mark.parametrize("backend", FUSED or [MISSING])
def test_cuda_graph(backend):
    run = select("barrier_weights", backend, DEVICE)
    rewards, norm, _, *rest = random_problem(7)
    state = fresh_state(rewards, rest[-2])
    arguments = moved((rewards, norm, None, state, *rest))
    run(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*arguments)
    arguments[0].mul_(1.5)
    graph.replay()
    for mine, right in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(bits(mine.cpu()), bits(right.cpu()))
