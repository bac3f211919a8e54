"""The other Triton kernels as compiled for sm_90, run from their PTX: the bits of the reference, in every order of the warps."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch
from barrier_problems import bits, fresh_state, random_problem
from compiled_rows import interpreted

from l3m_kernels import reference

if importlib.util.find_spec("triton") is None or interpreted():
    pytest.skip("Triton compiles nothing here", allow_module_level=True)

from triton_on_ptx import OnPtx

from l3m_kernels import triton_ops


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(s, marks=pytest.mark.slow) for s in range(6, 80))])
def test_barrier_weights_has_the_bits_of_the_reference(seed, monkeypatch):
    """With a square root that is correctly rounded on both sides; torch's is not always."""
    monkeypatch.setattr(torch, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))
    module = sys.modules["l3m_kernels.triton_ops.barrier"]
    rewards, norm, sums, *rest = random_problem(seed)
    state = fresh_state(rewards, rest[-2])
    for step in range(2):
        monkeypatch.setattr(module, "barrier_weights_kernel", OnPtx("barrier_weights", seed=seed + step))
        expected = reference.barrier_weights(rewards, norm, sums, state, *rest)
        actual = triton_ops.barrier_weights(rewards, norm, sums, state, *rest)
        for field, a, e in zip(reference.BarrierWeights._fields, actual, expected, strict=True):
            assert torch.equal(bits(a), bits(e)), field
        state, rewards = expected[-1], rewards.flip(0) * 1.1


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_sums_of_sequences(index, monkeypatch):
    """Empty and long ones, offsets outside the tokens; float64 sums of float32, so all but exact."""
    module = sys.modules["l3m_kernels.triton_ops.sequence_sums"]
    token = -torch.rand(2600, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(2600) % 7
    cu_seqlens = torch.tensor([0, 0, 5, 1030, 2600], dtype=index)
    for seed in range(3):
        monkeypatch.setattr(module, "sequence_sums_kernel", OnPtx("sequence_sums", seed=seed))
        sums, lengths = triton_ops.sequence_sums(token, targets, cu_seqlens, 3)
        edges = cu_seqlens.tolist()
        parts = [slice(first, last) for first, last in itertools.pairwise(edges)]
        wanted = torch.stack([token[part].double().sum() for part in parts])
        torch.testing.assert_close(sums, wanted, rtol=1e-14, atol=0)
        assert lengths.tolist() == [int((targets[part] != 3).sum()) for part in parts]
    beyond = torch.tensor([-4, 2, 4000], dtype=index)
    sums, lengths = triton_ops.sequence_sums(token, targets, beyond, 3)
    torch.testing.assert_close(sums, torch.stack([token[:2].double().sum(), token[2:].double().sum()]))
    assert lengths.tolist() == [2, int((targets[2:] != 3).sum())]
