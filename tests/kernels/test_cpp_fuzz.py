"""Random calls of the native head against the float64 oracle: any shape, dtype, stride, mask, workspace and number of threads.

The tests are a slice of it; `python tests/kernels/test_cpp_fuzz.py --first 100000 --count 5000` runs other seeds and prints the
worst error as a share of what is allowed, `make test-sanitize` under the sanitizers of the compiler.
"""

import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # what conftest.py does

import pytest
import torch
from fuzzing import main
from head_cases import HEAD_BACKENDS, Case
from test_ops_oracle import check

from l3m_kernels import set_workspace

pytestmark = pytest.mark.skipif("cpp" not in HEAD_BACKENDS, reason="backend cpp is not built here")


def fuzz(seed: int, large: float = 0.5) -> float:
    """One call, forward and backward -> the worst error, as a share of what is allowed. `large`: this share of the calls is."""
    draw = random.Random(-1 - seed)
    case = Case.random(seed, large=draw.random() < large)
    set_workspace(draw.choice((case.workspace, 1, 1 << 18, 1 << 21, None)), low_memory=draw.random() < 0.3)
    torch.set_num_threads(draw.choice((1, 1, 2, 3, 7)))
    return check("cpp", case, draw.choice(("log_likelihood", "weighted")))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "seed", [*range(150), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1000, 4000))]
)
def test_random_calls(seed):
    fuzz(seed)


if __name__ == "__main__":
    main(fuzz, __doc__)
