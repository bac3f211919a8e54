"""G11: a run that 1, 2 and 4 ranks share is one run: multipliers are the same bits on all, weights those of one rank after 50 steps; and a
batch in parts is the batch."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import rank_problems
import same_run_ranks
import torch
import torch.distributed as dist
from forks import ended, forked
from parts import Found, Part, Skipped, each

WORLDS = (2, 4)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def started(act: Any, folder: Path) -> list[Any]:
    """What `act(rank, groups)` returns on each of four ranks, forks of this process; by number of ranks the group that each is in."""

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=number, world_size=same_run_ranks.RANKS
        )
        torch.save(act(number, same_run_ranks.groups_of(number)), folder / f"{number}.pt")

    ranks = [forked(lambda n=n: rank(n), folder / f"{n}.said") for n in range(same_run_ranks.RANKS)]
    codes = [ended(process) for process in ranks]
    if set(codes) != {0}:
        said = "; ".join((folder / f"{rank}.said").read_text()[-1000:] for rank in range(len(ranks)))
        raise RuntimeError(f"exit codes {codes}: {said}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(ranks))]


def on_four(act: Any) -> list[Any]:
    if not hasattr(os, "fork") or not dist.is_available() or not dist.is_gloo_available():
        raise Skipped("needs os.fork, and torch with gloo")
    folder = Path(tempfile.mkdtemp(prefix="l3ms-trust-"))
    try:
        return started(act, folder)
    finally:
        shutil.rmtree(folder)


# ---- random problems ----


def problems(seeds: range) -> Found:
    def act(rank: int, groups: dict[int, Any]) -> dict[tuple[int, int], Any]:
        found: dict[Any, Any] = {}
        for seed in seeds:
            made = rank_problems.problem(seed)
            found[seed, 4] = attempt(made, rank, 4, groups[4], made.parts)
            if rank // 2 == seed % 2:  # each pair takes every other one
                found[seed, 2] = attempt(made, rank % 2, 2, groups[2], made.parts)
            for parts in (1, 3):
                if rank == seed % same_run_ranks.RANKS:  # alone, and one of them is enough
                    found[seed, 1, parts] = attempt(made, 0, 1, groups[1], parts)
        return found

    ranks = on_four(act)
    alone = {key: found for rank in ranks for key, found in rank.items() if len(key) == 3}

    def check(seed: int) -> float:
        made = rank_problems.problem(seed)
        what = f"{made.kind}, {made.dtype}, {made.optimizer}, {made.options}"
        weights, bits = right(alone[seed, 1, 1], what)
        assert (bits[-1] - bits[0]).abs().nan_to_num().max() > 0, f"nothing moved: {what}"
        worst = apart(right(alone[seed, 1, 3], what)[0], weights)
        for world in WORLDS:
            found = [right(rank[seed, world], f"{world} ranks, {what}") for rank in ranks if (seed, world) in rank]
            assert len(found) == world
            for _, other in found[1:]:
                same = torch.equal(other.nan_to_num(nan=-1.0), found[0][1].nan_to_num(nan=-1.0))
                assert same, f"{world} ranks: multipliers have other bits, {what}"
            worst = max([worst, *(apart(each_weights, weights) for each_weights, _ in found)])
        return worst / TOLERANCE[made.dtype]

    return each(check, seeds)


def attempt(made: rank_problems.Problem, *arguments: Any) -> Any:
    """The run, or what it raised: which is then the same on all ranks, or they would wait for each other."""
    try:
        return rank_problems.run(made, *arguments)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def right(found: Any, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    assert not isinstance(found, str), f"{found}: {what}"
    return found


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))


# ---- a language model ----

CASES = [
    (kind, world, dtype)
    for dtype in TOLERANCE
    for kind, worlds in same_run_ranks.KINDS.items()
    for world in worlds
    if world > 1
]


def models(seeds: range) -> Found:
    cases = [CASES[seed % len(CASES)] for seed in seeds]
    wanted = [("whole", 1, dtype) for dtype in TOLERANCE if dtype in {case[2] for case in cases}] + cases

    def act(rank: int, groups: dict[int, Any]) -> dict[Any, Any]:
        return {case: same_run_ranks.run(*case, groups) for case in wanted}

    ranks = on_four(act)

    def check(seed: int) -> float:
        case = CASES[seed % len(CASES)]
        expected, _ = ranks[0]["whole", 1, case[2]]
        bits = [rank[case][1].nan_to_num(nan=-1.0) for rank in ranks]
        assert all(torch.equal(bits[0], other) for other in bits), f"{case}: multipliers have other bits"
        pairs = [pair for rank in ranks for pair in zip(rank[case][0], expected, strict=True)]
        return max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / TOLERANCE[case[2]]

    return each(check, seeds)


def parts() -> list[Part]:
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    return [
        Part("random problems", problems, 36, slice=1, piece=12, environment=environment, seconds=100),
        Part("a language model", models, len(CASES), piece=len(CASES), environment=environment, seconds=120),
    ]
