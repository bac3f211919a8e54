"""What is counted as a direction of errors: rounding to the nearest has none, cutting off has."""

import pytest
import torch
from parts import Found
from trust_bias import add_errors, close


@pytest.mark.parametrize("cut", [False, True])
def test_numbers_that_are_cut_off_are_seen(cut):
    truth = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = truth.float()
    value = (value.view(torch.int32) & ~0xFFFF).view(torch.float32) if cut else value.bfloat16()
    found = Found()
    for name in ("token", "d_hidden", "d_weight"):
        add_errors(found, name, value, truth)
    close(found)
    assert found.failed == (3 if cut else 0), found.failures
    assert all("mean growth" in text for text in found.failures)


def test_nothing_is_no_proof():
    found = Found()
    close(found)
    assert found.failed == 3
