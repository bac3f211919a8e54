"""The sum that stands for a tensor: of every bit and its place; and who is said to differ."""

import pytest
import torch

import l3ms
from l3ms.ranks import agreement
from l3ms.ranks.agreement import bits, differences, usual_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.complex64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_bit_or_another_place_is_another_sum(dtype, monkeypatch):
    monkeypatch.setattr(agreement, "BLOCK", 16)
    tensor = torch.randint(0, 2, (7, 9), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len(tensor.unique()) == 2 if dtype is not torch.complex64 else True
    found = {int(bits(tensor))}
    for place in range(63):
        changed = tensor.clone().reshape(-1)
        raw = changed.view(torch.uint8)
        raw[place * changed.element_size()] ^= 1
        found.add(int(bits(changed)))
    assert len(found) == 64, "each of 63 changes of one bit is seen, and told from the others"
    exchanged = tensor.clone()
    exchanged[0], exchanged[1] = tensor[1].clone(), tensor[0].clone()
    assert int(bits(exchanged)) not in found
    assert bits(tensor) == bits(tensor.clone())
    assert bits(tensor.T) != bits(tensor), "the order of rows and columns is part of it"


def test_blocks_do_not_matter(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = bits(tensor)
    monkeypatch.setattr(agreement, "BLOCK", 7)
    assert bits(tensor) == whole
    assert bits(torch.empty(0)) == 0


def test_nan_is_like_itself():
    assert bits(torch.tensor([float("nan")])) == bits(torch.tensor([float("nan")]))
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))


def test_what_most_have_is_usual():
    assert usual_of(["a", "b", "b"]) == "b"
    assert usual_of(["a", "b"]) == "a"


def test_one_process_agrees_with_itself(make_model):
    assert differences({"seed": 3}) == []
    model = make_model()
    optimizer = l3ms.L3MOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [l3ms.Length(max=3)])
    l3ms.agree(optimizer)
    l3ms.agree(torch.optim.SGD(model.parameters(), lr=0.1), named=dict(model.named_parameters()))
