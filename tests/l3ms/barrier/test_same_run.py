"""One run by 1, 2 and 4 processes is the same run: DDP, fully_shard (also replicated), the vocabulary in parts, and both of these."""

import os
import subprocess
import sys

import pytest
import same_run_ranks
import torch

pytestmark = pytest.mark.slow

CASES = [(kind, world) for kind, worlds in same_run_ranks.KINDS.items() for world in worlds if world > 1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    outputs = [folder / f"{rank}.pt" for rank in range(same_run_ranks.RANKS)]
    command = [sys.executable, same_run_ranks.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder / "store"), str(output)], env=environment)
        for rank, output in enumerate(outputs)
    ]
    try:
        assert {process.wait(timeout=1200) for process in processes} == {0}
    finally:
        for process in processes:
            process.kill()
    return [torch.load(output) for output in outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "world"), CASES)
def test_multipliers_are_bit_equal_on_all_ranks(found, kind, world, dtype):
    _, bits = found[0][kind, world, dtype]
    for rank in found[1:]:
        assert torch.equal(bits.nan_to_num(nan=-1.0), rank[kind, world, dtype][1].nan_to_num(nan=-1.0))
    assert (bits[:, :4].max(0).values > bits[:, :4].min(0).values).all(), "every multiplier has moved"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("kind", "world"), CASES)
def test_weights_after_fifty_iterations_are_those_of_one_process(found, kind, world, dtype, tolerance):
    expected, _ = found[0]["whole", 1, dtype]
    start = [p.detach() for p in same_run_ranks.model(dtype=dtype).parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(expected, start, strict=True)) > 0.05
    for rank in found:
        weights, _ = rank[kind, world, dtype]
        apart = max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True))
        assert apart < tolerance
