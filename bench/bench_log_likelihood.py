"""`log_likelihood`, forward and backward, with an upstream gradient that is not known in advance: 8 n D V FLOPs with recomputation."""

import pytest

from l3ms.benchmark.shapes import Case, cases_of


@pytest.mark.parametrize("case", cases_of("log-likelihood"), ids=str)
def test_log_likelihood(play, case: Case) -> None:
    play(case)
