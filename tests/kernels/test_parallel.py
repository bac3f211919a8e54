"""The vocabulary-parallel head on 2 and 4 gloo ranks: the results of one process, what is sent, what is held, what is refused.

One program runs all of it, see `parallel_ranks.py`; the tests here look at what its ranks have found.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import FOUR, TRITON, TWO, Case
from parallel_ranks import PEAKS

from l3m_kernels import ops
from l3m_kernels.backends import TABLE
from l3m_kernels.vocabulary_shards import fingerprint

CASES = {2: TWO, 4: FOUR}
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks of memory from /proc")


def launch(world, folder, *only, **variables):
    """-> what each rank has found."""
    program = Path(__file__).with_name("parallel_ranks.py")
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # Freed blocks go back to the system at once: what is resident is what is held.
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": path} | variables
    command = [sys.executable, "-W", "error", str(program), str(world), str(folder), *only]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    return {world: launch(world, folder) for world in CASES}


def joined(found):
    """Of all ranks together; what each has whole is the same bits on all."""
    whole = {}
    for name in found[0]:
        values = [rank[name] for rank in found]
        if name in ("d_weight", "d_bias"):
            whole[name] = torch.cat(values)
        else:
            whole[name] = values[0]
            for value in values[1:]:
                bits = [t.contiguous().view(-1).view(torch.uint8) for t in (value, values[0])]
                assert torch.equal(*bits), name
    return whole


def compare(case: Case, found):
    exact = case.whole().run(ops.log_likelihood, ops.weighted_log_likelihood, exact=True)
    single = case.whole().run(ops.log_likelihood, ops.weighted_log_likelihood)
    found = joined(found)
    assert found.keys() == single.keys() == exact.keys()
    hidden, weight, *_ = case.tensors()
    # A log-sum-exp is sent in fp32: its rounding is in every probability.
    rounding = torch.finfo(torch.float32).eps * (4 + float((hidden.double() @ weight.double().T).abs().max()))
    for name, want in exact.items():
        got, own = found[name], single[name]
        assert (got.dtype, got.shape) == (own.dtype, own.shape), name
        if case.dtype == torch.float64 or name == "length":
            told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True, msg=told)
            continue
        error, of_one = ((values.double() - want).abs().max() for values in (got, own))
        assert error <= 3 * of_one + rounding * want.abs().max(), (name, error, of_one)


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, table in CASES.items() for name in table], ids=str
)
def test_results_are_those_of_one_process(ranks, world, name):
    case = CASES[world][name]
    cpp = next(row for row in TABLE if row.name == "cpp")
    if case.backend == "cpp" and cpp.missing:
        pytest.skip(cpp.missing)
    compare(case, [rank["cases"][name] for rank in ranks[world]])


def test_a_call_sends_the_statistics_and_the_gradient_of_hidden_once(ranks):
    for rank in ranks[2]:
        rows, width = 5, 3  # scored ones, D
        statistics = ("c10d::allgather_", 4 * (2 * rows + 1))
        for name in ("all", "frozen hidden"):
            first, forward, backward, counted = rank["traffic"][name]
            assert first == [("c10d::allgather_", 720), statistics]
            assert forward == [statistics]
            assert list(counted.values()) == [1]
            assert backward == ([] if name == "frozen hidden" else [("c10d::allreduce_", 4 * rows * width)])


def test_neither_logits_nor_the_whole_weight_are_held(ranks):
    for rank in ranks[2]:
        for (name, backend), peak in rank["peaks"].items():
            tokens, vocabulary, width, workspace = PEAKS[name]
            # hidden, its gradient in two precisions, and rows of it; the gradient of this rank's rows; the heap's slack
            allowed = workspace + 4 * 4 * tokens * width + 4 * vocabulary // 2 * width + (3 << 20)
            if name == "weight":
                assert allowed < 4 * vocabulary * width  # which one who gathers holds
            else:
                assert allowed < 4 * tokens * vocabulary // 4
            assert (peak > allowed) == (backend == "gathered"), (name, backend, peak, allowed)


def test_backward_again_is_the_same_bits_and_autocast_is_that_of_a_product(ranks):
    for rank in ranks[2]:
        for first, second in zip(*rank["again"]["grads"], strict=True):
            assert torch.equal(first, second)
        assert torch.equal(*rank["again"]["plain"])
        hidden = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        weight = torch.cat([torch.eye(5, 3)] * 2)
        targets = torch.tensor([0, 5, -100, 9, 2, 2])
        with torch.autocast("cpu", torch.bfloat16):
            wanted = ops.log_likelihood(hidden, weight, targets, torch.tensor([0, 6])).token
        torch.testing.assert_close(rank["again"]["autocast"], wanted)


def test_no_tokens_none_scored_and_rows_of_nan(ranks):
    for rank in ranks[2]:
        found = rank["again"]
        assert found["empty"].shape == (0,)
        assert found["ignored"].tolist() == [0.0]
        assert not found["zero"].any()
        assert found["poisoned"].isnan().tolist() == [False, True, False, True]  # the third is not scored


ALL_RANKS = {
    "outside": "IndexError: log_likelihood: targets[1] = 10 is outside the vocabulary [0, 10)",
    "outside again": "IndexError: log_likelihood: targets[1] = -3 is outside the vocabulary [0, 10)",
    "ranks' targets": "ValueError: log_likelihood: targets must be the same on all ranks of the group, and rank 1 differs",
    "ranks' targets again": "ValueError: l3m_kernels.parallel: targets must be the same on all ranks of the group",
    "ranks' options": "ValueError: log_likelihood: each of softcap, temperature, ignore_index and scored must be the same",
    "ranks' gradients": "ValueError: log_likelihood: whether hidden needs a gradient must be the same",
    "no rows": "ValueError: log_likelihood: weight must have at least one row",
    "seq_weight": "ValueError: weighted_log_likelihood: seq_weight is a constant",
    "backend": "RuntimeError: log_likelihood: backend 'cuda' cannot be used",
    "second derivative": "RuntimeError: l3m_kernels: log_likelihood and weighted_log_likelihood have no second derivative",
}
ONE_RANK = {  # what it says itself, and the others
    "one rank's bias": "bias must be (V,) = (5,), got shape (4,)",
    "one rank's dtype": "weight must have hidden's dtype torch.bfloat16, got torch.float32",
    "ranks' shapes": "targets must be (5,) like hidden, got shape (4,)",
}


def test_what_one_rank_refuses_all_raise(ranks):
    for index, rank in enumerate(ranks[2]):
        assert rank["refused"].keys() == ALL_RANKS.keys() | ONE_RANK.keys()
        for name, text in ALL_RANKS.items():
            assert rank["refused"][name].startswith(text), rank["refused"][name]
        for name, text in ONE_RANK.items():
            who = "" if index == 1 else "rank 1 of the group refuses: "
            assert rank["refused"][name].startswith(f"ValueError: log_likelihood: {who}{text}"), rank["refused"][name]


def one_process(generator_seed=3):
    """Of the two batches of `parallel_ranks.dtensors`: token, d_hidden, d_weight, d_bias."""
    generator = torch.Generator().manual_seed(generator_seed)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(11, generator=generator, dtype=torch.float64).requires_grad_()
    batches = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (2, 6), generator=generator)
    for hidden, target in zip(batches, targets, strict=True):
        hidden.requires_grad_()
        found = ops.log_likelihood(hidden, weight, target, torch.tensor([0, 2, 6]), bias=bias)
        loss = -(found.sequence * torch.tensor([1.0, -0.5])).sum()
        yield found.token.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))


@pytest.mark.parametrize(
    "name",
    [
        *(f"{mesh}, {kind}" for mesh in ("tp", "replicated x tp") for kind in ("plain", "weighted")),
        "hidden, plain",
        "sharded parameters, fsdp",
        "in a forward, fsdp",
    ],
)
def test_a_dtensor_takes_its_group_along(ranks, name):
    batches = list(one_process())
    means = [sum(values) / 2 for values in zip(*(batch[2:] for batch in batches), strict=True)]
    for index, rank in enumerate(ranks[4]):
        wanted = batches[index // 2]
        if "fsdp" in name:  # which averages the gradients of its ranks' batches
            wanted = (*wanted[:2], *means)
        for got, want in zip(rank["results"][name], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


DTENSORS = {
    "columns": "its rows must be sharded over one mesh dimension; redistribute it to Shard(0)",
    "whole": "whole on every rank; pass weight.to_local()",
    "partial": "sums that are not added up; redistribute it to Shard(0) first",
    "two": "its rows are sharded over 2 mesh dimensions, and it cannot be told which of them shares the hidden states",
    "data parallel": "targets must be the same on all ranks of the group, and rank 2 differs from rank 0",
    "bias": "bias must be a DTensor of weight's mesh and placements",
    "hidden": "pass hidden.redistribute(placements=[Replicate()] * 1)",
    "group": "group must be None for a DTensor",
}


def test_dtensors_that_cannot_be_right_are_refused_on_all_ranks(ranks):
    for rank in ranks[4]:
        assert rank["refused"].keys() == DTENSORS.keys()
        for name, text in DTENSORS.items():
            assert rank["refused"][name].startswith("ValueError: log_likelihood: "), rank["refused"][name]
            assert text in rank["refused"][name], name


def marks(*batches):
    return [int(fingerprint(torch.as_tensor(targets))) for targets in batches]


def test_a_fingerprint_of_targets_tells_small_changes():
    """It is sent in fp32, which holds every number below 2**24."""
    assert max(marks(*([token] for token in range(-100, 1000, 3)))) < 1 << 22
    assert len(set(marks(*([token] for token in range(100))))) == 100
    targets = torch.arange(40) % 3
    changed = [targets + change * (torch.arange(40) == row) for row in range(40) for change in range(1, 9)]
    assert len(set(marks(targets, *changed))) == 1 + len(changed)
    assert len(set(marks([7, 5, 9], [5, 7, 9], [9, 5, 7], [7, 9, 5]))) == 4
    assert len(set(marks([3, 0], [0, 1], [1, 2]))) == 3  # 3 * 1 = 1 * 3: small factors will not do
    assert len(set(marks([-(2**63), 1], [-(2**63), 2], [2**63 - 1, 2]))) == 3  # the first is `drop_in.NO_TOKEN`


@pytest.mark.parametrize("name", ["hidden", "targets", "cu_seqlens", "bias", "seq_weight"])
def test_a_dtensor_beside_a_plain_weight_is_refused(one_rank, name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    arguments: dict[str, Any] = {
        "hidden": torch.ones(3, 2),
        "weight": torch.ones(4, 2),
        "targets": torch.tensor([0, 1, 3]),
    }
    arguments |= {"seq_weight": torch.ones(1), "cu_seqlens": torch.tensor([0, 3]), "bias": torch.zeros(4)}
    arguments[name] = distribute_tensor(arguments[name], init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(ValueError, match=rf"{name} is a DTensor and weight is not; pass {name}.to_local\(\)"):
        ops.weighted_log_likelihood(**arguments)


def test_without_a_process_group_it_is_refused():
    from l3m_kernels import parallel

    with pytest.raises(ValueError, match="has no process group; call init_process_group first"):
        parallel.log_likelihood(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), torch.tensor([0, 1]))


@pytest.mark.slow
def test_the_kernels_of_triton_in_its_interpreter(tmp_path):
    pytest.importorskip("triton")
    found = launch(2, tmp_path, "triton", TRITON_INTERPRET="1")
    compare(replace(TRITON, backend="reference"), [rank["cases"]["triton"] for rank in found])
