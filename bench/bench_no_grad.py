"""`log_likelihood` without gradients: 2 n D V FLOPs."""

import pytest

from l3ms.benchmark.shapes import Case, cases_of


@pytest.mark.parametrize("case", cases_of("no-grad"), ids=str)
def test_no_grad(play, case: Case) -> None:
    play(case)
