"""State comes back from JSON and safetensors as it was, types and bits; what nobody saved is one line."""

import collections
import enum
import json
import math
import random

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from l3ms.model.random_numbers import random_state, set_random_state
from l3ms.training.state_trees import load_tree, save_tree

BASE = torch.arange(6.0)
TREES = [
    None, True, 0, -1.5, 1 / 3, 5e-324, math.inf, "", "tensor", [], {}, (), [1, [2, (3, {"a": None})]], {1: "one", "1": "text"},
    {"dict": {"tuple": {"tensor": [1]}}}, {(0, "a"): 1}, torch.tensor(3), torch.zeros(0, 3), torch.tensor([math.nan, -0.0, math.inf]),
    collections.Counter({3: 2, "a": 1}), torch.arange(3, dtype=torch.uint8), torch.ones(2, 3).bfloat16(), torch.ones(2, 3).T,
    {"same": [BASE, BASE, BASE[1:3]]},
]  # fmt: skip


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        ours, theirs = (x.contiguous().view(-1).view(torch.uint8).tolist() if x.numel() else [] for x in (one, other))
        assert ours == theirs
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: str(tree)[:30])
def test_it_comes_back(tmp_path, tree):
    save_tree(tmp_path, "state", tree)
    same(load_tree(tmp_path, "state"), tree)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


def test_an_optimizer_and_its_scheduler_go_on(tmp_path):
    def made():
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.5, 0.95))
        return weight, optimizer, get_scheduler("cosine", optimizer, 2, 10)

    def step(weight, optimizer, scheduler):
        (weight**2).sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    first, second = made(), made()
    for _ in range(3):
        step(*first)
    save_tree(tmp_path, "optimizer", first[1].state_dict())
    save_tree(tmp_path, "scheduler", first[2].state_dict())
    second[0].data.copy_(first[0].data)
    second[1].load_state_dict(load_tree(tmp_path, "optimizer"))
    second[2].load_state_dict(load_tree(tmp_path, "scheduler"))
    for _ in range(3):
        step(*first)
        step(*second)
    assert torch.equal(first[0], second[0])
    assert first[1].param_groups[0]["lr"] == second[1].param_groups[0]["lr"]


def test_random_numbers_go_on(tmp_path):
    def draw():
        return [random.gauss(0, 1), np.random.standard_normal(), float(torch.randn(()))]

    device = torch.device("cpu")
    draw()  # half of a pair of Gaussians is kept for the next call
    save_tree(tmp_path, "random", random_state(device))
    first = [draw() for _ in range(700)]
    set_random_state(load_tree(tmp_path, "random"), device)
    assert [draw() for _ in range(700)] == first


@pytest.mark.parametrize("value", [{1, 2}, object(), np.zeros(3), [torch.device("cpu")], 1j])
def test_what_cannot_be_saved_is_an_error(tmp_path, value):
    with pytest.raises(TypeError, match="cannot save a"):
        save_tree(tmp_path, "state", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"set": []}', "{}", '{"tensor": "7"}', '{"tensor": []}', '{"dict": [[1]]}', '{"dict": 3}', '{"tuple": 1}',
     '{"dict": [[{"dict": []}, 1]]}', '{"a": 1, "b": 2}'],
)  # fmt: skip
def test_what_was_not_saved_is_one_line(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state.json is not a state that was saved") as error:
        load_tree(tmp_path, "state")
    assert "\n" not in str(error.value)


def test_a_damaged_tensor_file_is_one_line(tmp_path):
    save_tree(tmp_path, "state", torch.ones(3))
    (tmp_path / "state.safetensors").write_bytes(b"\xff" * 30)
    with pytest.raises(ValueError, match=r"state.json is not a state that was saved"):
        load_tree(tmp_path, "state")


def test_no_file_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tree(tmp_path, "state")
    (tmp_path / "state.json").write_text(json.dumps(1))
    assert load_tree(tmp_path, "state") == 1


class Kind(str, enum.Enum):
    LINEAR = "linear"


class Number(enum.IntEnum):
    TWO = 2


def test_numbers_of_others_are_pythons(tmp_path):
    rate = np.logspace(-3, -2, 2)[0]
    tree = [rate, np.float32(0.5), np.int64(3), np.bool_(True), Number.TWO, Kind.LINEAR]
    save_tree(tmp_path, "state", tree)
    same(load_tree(tmp_path, "state"), [float(rate), 0.5, 3, True, 2, "linear"])


def test_what_cannot_be_saved_is_said_with_its_place(tmp_path):
    with pytest.raises(TypeError, match=r"cannot save a set in a checkpoint: optimizer.groups.1.names"):
        save_tree(tmp_path, "optimizer", {"groups": [{}, {"names": {1}}]})


def test_a_sequence_of_schedules_goes_on(tmp_path):
    schedules = torch.optim.lr_scheduler

    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        parts = [schedules.LinearLR(optimizer, 0.1, 1.0, 4), schedules.MultiStepLR(optimizer, [2, 3], 0.1)]
        return optimizer, schedules.SequentialLR(optimizer, parts, [4])

    def rates(optimizer, scheduler, steps):
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    whole, cut = made(), made()
    expected = rates(*whole, 9)
    assert rates(*cut, 3) == expected[:3]
    save_tree(tmp_path, "scheduler", cut[1].state_dict())
    again = made()
    again[0].load_state_dict(cut[0].state_dict())
    again[1].load_state_dict(load_tree(tmp_path, "scheduler"))
    assert rates(*again, 6) == expected[3:]
