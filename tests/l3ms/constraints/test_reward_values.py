"""What counts as the numbers of a reward function, and what only looks like it."""

from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import l3ms
from l3ms.constraints.reward_values import numbers

WHERE = "constraint 'r': graded"


@pytest.mark.parametrize(
    "values",
    [
        [0, 1.0],
        (False, True),
        np.array([0, 1], dtype=np.float32),
        np.array([False, True]),
        torch.tensor([0.0, 1.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([False, True]),
        [np.float32(0), torch.tensor(1)],
        [Decimal(0), Fraction(1, 1)],
        range(2),
        deque([0, 1]),
        {"a": 0, "b": 1}.values(),
    ],
)
def test_numbers_in_an_order(values):
    assert numbers(WHERE, values, 2) == [0.0, 1.0]


def test_a_generator_is_taken_once():
    assert numbers(WHERE, (n if n else None for n in range(3)), 3) == [None, 1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ("01", "must return a list of 2 numbers, got str"),
        (b"01", "must return a list of 2 numbers, got bytes"),
        ({0: 0.5, 1: 0.7}, "must return a list of 2 numbers, got dict"),
        ({0: 0.5, 1: 0.7}.keys(), "must return a list of 2 numbers, got dict_keys"),
        ({0.5, 0.7}, "must return a list of 2 numbers, got set"),
        (np.zeros((2, 1)), "must return a list of 2 numbers, got ndarray of shape (2, 1)"),
        (torch.zeros(2, 2), "must return a list of 2 numbers, got Tensor of shape (2, 2)"),
        (torch.zeros(()), "must return a list of 2 numbers, got Tensor of shape ()"),
        (iter([1.0]), "must return one number per response, wanted 2, got 1"),
        ([[1.0], [2.0]], "row 0 is [1.0], wanted a number or None"),
        ([1.0, torch.zeros(1)], "row 1 is tensor([0.]), wanted a number or None"),
        ([1.0, "3"], "row 1 is '3', wanted a number or None"),
        ([1.0, b"3"], "row 1 is b'3', wanted a number or None"),
        (np.array(["1", "2"]), "row 0 is np.str_('1'), wanted a number or None"),
        ([1.0, 1j], "row 1 is 1j, wanted a number or None"),
        (np.array([0, 1j]), "row 0 is np.complex128(0j), wanted a number or None"),
        (torch.tensor([0, 1j]), "row 0 is tensor(0.+0.j), wanted a number or None"),
        ([10**400, 1], "row 0 is 1000"),
        ([{}, 1], "row 0 is {}, wanted a number or None"),
    ],
)
def test_what_only_looks_like_numbers_is_refused(values, named):
    def graded(prompts, completions):
        return values

    with pytest.raises(ValueError, match=WHERE) as error:
        l3ms.Constraint("r", graded, max=1).rewards(["p"] * 2, ["x"] * 2, [1] * 2)
    assert str(error.value).startswith(f"{WHERE}{':' if named.startswith('row') else ''} {named}")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("values", ["01", {0: 1.0, 1: 2.0}, ["1", "2"], [[1.0], [2.0]], torch.tensor([1j, 2])])
def test_values_that_are_observed_are_numbers_too(values):
    optimizer = l3ms.L3MOptimizer(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), [l3ms.Constraint("r", max=1)]
    )
    with pytest.raises(ValueError, match=r"observe: .*constraint 'r'"):
        optimizer.observe({"r": values})
