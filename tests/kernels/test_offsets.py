"""Offsets of the sequences that are wrong: refused on a CPU; on a GPU, where nobody looks, told later, and never an index outside."""

import pytest
import torch
from head_cases import HEAD_BACKENDS, Case, Inputs
from torch import Tensor

from l3m_kernels import check_targets, checks, device_flags, log_likelihood, ops, weighted_log_likelihood
from l3m_kernels.checks import within

TOKENS = 12
WRONG = {
    "end early": [0, 4, 4, 9],
    "end late": [0, 4, 4, 13],
    "lead far outside": [0, 4, 2**40, TOKENS],
    "start late": [1, 4, 4, TOKENS],
    "start before": [-1, 4, 4, TOKENS],
    "decrease": [0, 9, 4, TOKENS],
    "are of nothing": [0, 0, 0, 0],
}
wrong = pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)


@pytest.fixture
def flags(monkeypatch) -> dict[str, Tensor]:
    """Those of a device that is played: nothing is looked at on the host, and what would go to it stays."""
    found = {name: torch.zeros(1, dtype=torch.int32) for name in device_flags.FAULTS}
    monkeypatch.setattr(device_flags, "flag", lambda device, fault: found[fault])
    monkeypatch.setattr(checks, "check_values", lambda *_: None)
    monkeypatch.setattr(ops, "check_values", lambda *_: None)
    monkeypatch.setattr(ops, "offsets_on", lambda device, cu_seqlens, tokens: within(cu_seqlens, tokens))
    return found


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("given", [[0, 4, 4, TOKENS], [0, TOKENS], [0, 0, TOKENS, TOKENS]])
def test_right_ones_are_what_they_were(given, dtype, flags):
    offsets, fault = within(torch.tensor(given, dtype=dtype), TOKENS)
    assert offsets.tolist() == given
    assert (float(fault), int(flags["cu_seqlens"])) == (0.0, 0)


@wrong
def test_wrong_ones_become_some_that_lead_nowhere_outside(given, flags):
    cu_seqlens = torch.tensor(given)
    offsets, fault = within(cu_seqlens, TOKENS)
    assert cu_seqlens.tolist() == given  # the caller's, and saved for the backward
    assert (int(offsets[0]), int(offsets[-1]), bool((offsets.diff() >= 0).all())) == (0, TOKENS, True)
    assert fault.isnan()
    assert {name: int(flag) for name, flag in flags.items()} == {"targets": 0, "scored": 0, "cu_seqlens": 1}


def results(inputs: Inputs, cu_seqlens: Tensor, weighted: bool, backend: str) -> dict[str, Tensor]:
    arguments = (inputs.hidden, inputs.weight, inputs.targets)
    if weighted:
        loss, out = weighted_log_likelihood(*arguments, inputs.seq_weight, cu_seqlens, backend=backend)
    else:
        out = log_likelihood(*arguments, cu_seqlens, backend=backend)
        loss = (inputs.grad_sequence * out.sequence).sum()
    d_hidden, d_weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return {"loss": loss.detach(), "sequence": out.sequence.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


@wrong
@pytest.mark.parametrize("backend", HEAD_BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_is_answered_that_was_not_asked(weighted, backend, given, flags):
    """Every backend, on offsets that used to be an index outside: NaN, and the flag is up."""
    case = Case.plain(dtype=torch.float32, lengths=(4, 0, 8), softcap=None, bias=False)
    inputs = case.build()
    assert inputs.cu_seqlens is not None
    right = results(inputs, inputs.cu_seqlens, weighted, backend)
    assert all(bool(value.isfinite().all()) for value in right.values())
    assert int(flags["cu_seqlens"]) == 0
    found = results(inputs, torch.tensor(given), weighted, backend)
    scored = inputs.targets != case.ignore_index
    assert all(bool(found[name].isnan().all()) for name in ("loss", "sequence", "d_weight"))
    assert bool(found["d_hidden"][scored].isnan().all())
    assert int(flags["cu_seqlens"]) == 1


@wrong
@pytest.mark.parametrize("backend", HEAD_BACKENDS)
def test_on_a_cpu_they_are_refused(given, backend):
    inputs = Case.plain(dtype=torch.float32, lengths=(4, 0, 8)).build()
    with pytest.raises(ValueError, match=r"cu_seqlens must start at 0, never decrease and end at T = 12"):
        log_likelihood(inputs.hidden, inputs.weight, inputs.targets, torch.tensor(given), backend=backend)


def test_no_sequence_of_some_rows_is_refused_without_a_look():
    """One offset cannot be both 0 and T: the shape says so, on any device."""
    cu_seqlens = torch.empty(1, dtype=torch.int64, device="meta")
    targets = torch.zeros(3, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"cu_seqlens must start at 0 and end at T = 3 .* got one offset"):
        checks.check_values("log_likelihood", targets, cu_seqlens, 7, -100)
    check_targets("cpu")
