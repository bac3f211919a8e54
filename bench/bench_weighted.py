"""`weighted_log_likelihood`, forward and backward: the weight of each sequence is known in advance, 6 n D V FLOPs."""

import pytest

from l3ms.benchmark.shapes import Case, cases_of


@pytest.mark.parametrize("case", cases_of("weighted"), ids=str)
def test_weighted(play, case: Case) -> None:
    play(case)
