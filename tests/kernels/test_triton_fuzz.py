"""Random calls of the Triton kernels, in Triton's interpreter, against the float64 oracle: any shape, dtype, stride, mask and workspace.

Runs where TRITON_INTERPRET=1 (`test_triton.py` starts such a process); `TRITON_INTERPRET=1 python tests/kernels/test_triton_fuzz.py
--first 100000 --count 5000` runs other seeds. Blocks of columns are smaller here than on a GPU, so that rows have several.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # what conftest.py does
    import interpreter

    interpreter.prepare()

from dataclasses import replace

import pytest
import torch
from fuzzing import main
from head_cases import HEAD_BACKENDS, Case
from test_ops_oracle import check

from l3m_kernels import set_workspace

if "triton" not in HEAD_BACKENDS:
    pytest.skip("the kernels run in the interpreter only where TRITON_INTERPRET=1", allow_module_level=True)

from l3m_kernels.triton_ops.configs import Config

softmax_module = sys.modules["l3m_kernels.triton_ops.softmax_gradient"]


def fuzz(seed: int, make: Callable[..., Case] = Case.random) -> float:
    """One call, forward and backward -> the worst error, as a share of what is allowed."""
    draw = random.Random(-1 - seed)
    large = draw.random() < 0.15
    case = make(seed, large=large)
    if large:  # for its vocabulary: a program of the interpreter takes milliseconds
        case = replace(case, unscored=min(case.unscored, 0.3))
    if large or case.width == 1:  # a product of one row, or one column, is a long sum in the BLAS of a CPU
        lengths = draw.choice(((9, 0, 6), (8, 12), (17,)))
        case = replace(case, lengths=lengths)
    if case.dtype == torch.float64:
        case = replace(case, dtype=draw.choice((torch.float32, torch.bfloat16, torch.float16)))
    sizes = (1 << 18, 1 << 20, None) if large else (case.workspace, 1, 1 << 18, None)
    set_workspace(draw.choice(sizes), low_memory=draw.random() < 0.3)
    block = draw.choice((512, 1024, None)) if large else draw.choice((32, 64, None))
    with pytest.MonkeyPatch.context() as patch:
        if block:
            patch.setattr(softmax_module, "for_rows", lambda *_: Config(block, 1))
        return check("triton", case, draw.choice(("log_likelihood", "weighted")))


@pytest.mark.parametrize(
    "seed", [*range(50), *(pytest.param(s, marks=pytest.mark.slow) for s in (*range(50, 100), *range(1000, 2720)))]
)
def test_random_calls(seed):
    fuzz(seed)


if __name__ == "__main__":
    main(fuzz, __doc__)
