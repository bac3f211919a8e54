"""What the Triton compiler makes of the row kernel's numbers: rows beyond 2^31 elements, columns and targets in 32 bits."""

import importlib.util
import os
import re

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or "TRITON_INTERPRET" in os.environ, reason="nothing compiles here"
)

MODES = ("log-likelihood", "gradient", "gradient, bias, softcap", "gradient, known lse")


def intermediate(mode: str) -> str:
    """Triton's intermediate code of the kernel for a 16-bit gradient."""
    from l3m_kernels.triton_ops.ahead import compile_kernel, variants

    name = f"bf16, {mode}"
    variant = next(one for one in variants() if one.kernel == "softmax_gradient" and one.name == name)
    return compile_kernel(variant, 90).asm["ttir"]


@pytest.mark.parametrize("mode", MODES)
def test_offsets_of_rows_have_64_bits(mode):
    """A row's number and stride are multiplied in 64 bits, and every pointer goes to its row by such an offset; columns stay within one."""
    text = intermediate(mode)
    offsets = re.findall(r"tt\.addptr %(\w+?)(?:_ptr\w*)?, %\w+ : !tt\.ptr<\w+>, (i\d+)", text)
    rows = {name: kind for name, kind in offsets if kind == "i64"}
    wanted = {"logits", "targets", "lse"}
    wanted |= set() if mode == "log-likelihood" else {"gradient", "upstream"}
    wanted |= set() if mode == "gradient, known lse" else {"token"}
    assert set(rows) == wanted, offsets
    # the target's own logit and bias, within the row
    assert {kind for name, kind in offsets if name not in rows} <= {"i32"}
    products = re.findall(r"arith\.muli .* : (i\d+)", text)
    assert products.count("i64") == (1 if mode == "log-likelihood" else 2), "row * stride, and row * gradient_stride"


@pytest.mark.parametrize("mode", MODES)
def test_no_column_is_compared_in_64_bits(mode):
    """That is two instructions each: a target is made an int32 once, when it is known to be a column."""
    compared = re.findall(r"arith\.cmpi .* : (\S+)", intermediate(mode))
    assert any("xi32" in kind for kind in compared)
    assert not [kind for kind in compared if "xi64" in kind]


def test_more_columns_than_an_int32_counts_are_refused():
    from l3m_kernels.triton_ops.softmax_gradient import softmax_gradient

    logits, rows = torch.zeros(1, 1).expand(1, 2**31), torch.zeros(1)
    with pytest.raises(ValueError, match="at most 2147418112 columns, got 2147483648"):
        softmax_gradient(logits, rows.long(), None, None, 0.0, 1.0, torch.float32, rows, rows, rows.int())
