"""`weighted_log_likelihood` with a frozen head, as under LoRA: no weight gradient, 4 n D V FLOPs."""

import pytest

from l3ms.benchmark.shapes import Case, cases_of


@pytest.mark.parametrize("case", cases_of("frozen"), ids=str)
def test_frozen(play, case: Case) -> None:
    play(case)
