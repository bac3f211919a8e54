"""A grid of blocks, in clusters; the warps of a cluster in a random order (PTX ISA, 3 "PTX Machine Model", 9.7.13 barriers).

A warp is groups of lanes, each at one instruction. Groups that come to the same instruction are one from there; which group goes on is
drawn, the one that is furthest behind more often than not. A barrier or shuffle waits for all lanes that it names (bar.sync: all of the
warp that have not ended, since it is `aligned`); lanes that wait at different ones are a Fault. Which warp goes on, and for how many
instructions, 1 to 1024, is drawn as well, so that a warp is now and then a loop ahead of another, and now and then a single load.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx.memory import Memory
from ptx.movement import GENERIC_SHARED
from ptx.opcodes import LANES
from ptx.program import SHARED, Program, Step
from ptx.races import Clocks, Races
from ptx.text import Fault

GLOBAL = 0x7F00_0000_0000  # where global memory begins
ALL_BYTES = np.ones(LANES, bool).tobytes()


def run(
    program: Program,
    memory: Memory,
    arguments: Sequence[bytes],
    blocks: int,
    threads: int,
    seed: int,
    cluster: int = 1,
    inexact: int | None = None,
    watch: bool = True,
) -> None:
    """One cluster of this many blocks after the other, in a drawn order.

    `inexact`: what is approximate is off, differently for each number. `watch`: two threads that race are a Fault. Raises: Fault.
    """
    sizes = list(program.entry.parameters.values())
    if [len(argument) for argument in arguments] != sizes:
        raise Fault(f"parameters of {sizes} bytes wanted, {[len(argument) for argument in arguments]} given")
    assert blocks % cluster == 0, "whole clusters"
    assert threads % LANES == 0, "whole warps"
    parameters = dict(zip(program.entry.parameters, arguments, strict=True))
    draw, clusters = random.Random(seed), blocks // cluster
    with np.errstate(all="ignore"):
        for number in draw.sample(range(clusters), clusters):
            Cluster(program, memory, parameters, number * cluster, cluster, blocks, threads, inexact, watch).run(draw)


class Cluster:
    def __init__(self, program, memory, parameters, first, size, blocks, threads, inexact, watch):
        self.program, self.parameters, self.inexact = program, parameters, inexact
        self.clocks = Clocks(size * threads) if watch else None
        shared = Memory(SHARED, (size + 1) * program.span)
        for rank in range(size):
            program.place_shared(shared, rank)
        self.memories = {
            name: (each, None if self.clocks is None else Races(each, self.clocks))
            for name, each in (("global", memory), ("shared", shared))
        }
        self.special = {
            "%nctaid.x": blocks,
            "%ntid.x": threads,
            "%cluster_nctarank": size,
            "%clusterid.x": first // size,
        }
        self.special |= {f"%{name}.{axis}": 0 for name in ("tid", "ctaid") for axis in "yz"}
        self.special |= {f"%{name}.{axis}": 1 for name in ("ntid", "nctaid") for axis in "yz"}
        self.blocks = [Block(self, rank, first + rank, threads) for rank in range(size)]
        self.warps = [warp for block in self.blocks for warp in block.warps]
        self.generation = self.arrived = 0  # of the cluster's barrier: how often it opened, threads that came since
        self.together: Any = 0  # what these knew
        self.opened_with: Any = 0

    def run(self, draw: random.Random) -> None:
        while ready := [warp for warp in self.warps if warp.ready()]:
            warp = draw.choice(ready)
            warp.advance(1 << draw.randrange(11), draw)
            self._open()
            if warp.waits is not None:
                warp.block.open_barrier(warp)
            if not any(each.groups for each in warp.block.warps):
                warp.block.end()
        for warp in self.warps:
            if warp.waits is not None:
                _, came, wanted = warp.block.at_barrier(warp)
                raise self.program.steps[warp.at].instruction.fault(f"waits for ever: {came} of {wanted} threads came")
            for at in warp.groups:
                raise self.program.steps[at].instruction.fault("waits for ever: not all threads of the cluster came")

    def arrive(self, warp: "Warp", lanes: np.ndarray, ordered: bool) -> None:
        if (warp.arrived_in[lanes] >= 0).any():
            raise Fault("arrives twice at the barrier of the cluster, and does not wait")
        warp.arrived_in[lanes] = self.generation
        self.arrived += int(lanes.sum())
        if self.clocks is not None and ordered:
            self.together = np.maximum(self.together, self.clocks.release(warp.threads[lanes]))

    def passed(self, warp: "Warp", lanes: np.ndarray, ordered: bool) -> bool:
        """Whether what these wait for has happened; then they know of it."""
        if (warp.arrived_in[lanes] < 0).any():
            raise Fault("waits at the barrier of the cluster, and has not arrived")
        if (warp.arrived_in[lanes] >= self.generation).any():
            return False
        warp.arrived_in[lanes] = -1
        if self.clocks is not None and ordered:
            self.clocks.acquire(warp.threads[lanes], self.opened_with)
        return True

    def _open(self) -> None:
        """Where all threads that have not ended have arrived."""
        if self.arrived and all((warp.arrived_in[warp.alive] == self.generation).all() for warp in self.warps):
            self.generation, self.arrived = self.generation + 1, 0
            self.opened_with, self.together = self.together, 0
            for warp in self.warps:
                warp.parked.clear()


class Block:
    def __init__(self, cluster: Cluster, rank: int, number: int, threads: int):
        self.cluster, self.rank, self.threads = cluster, rank, threads
        self.special = cluster.special | {"%ctaid.x": number, "%cluster_ctarank": rank, "%cluster_ctaid.x": rank}
        self.warps = [Warp(self, first) for first in range(0, threads, LANES)]

    def at_barrier(self, warp: "Warp") -> tuple[list["Warp"], int, int]:
        """-> the warps that wait where this one does, threads of theirs, threads that the barrier waits for"""
        barrier = self.cluster.program.steps[warp.at].barrier
        assert barrier is not None
        here = [each for each in self.warps if each.waits == barrier[0]]
        return here, sum(int(each.alive.sum()) for each in here), barrier[1] or self.threads

    def open_barrier(self, warp: "Warp") -> None:
        here, came, wanted = self.at_barrier(warp)
        if came != wanted:
            return
        for each in here:
            each.waits = None
        if self.cluster.clocks is not None:
            self.cluster.clocks.meet(np.concatenate([each.threads[each.alive] for each in here]))

    def end(self) -> None:
        """Its shared memory ends with it: nobody may have been able to come later, and nobody can from here on."""
        memory, races = self.cluster.memories["shared"]
        start, size = (self.rank + 1) * self.cluster.program.span, self.cluster.program.span
        if races is not None and self.cluster.clocks is not None:
            threads = np.concatenate([warp.threads for warp in self.warps])
            races.ends(start, size, self.cluster.clocks.known[threads].max(0))
        memory.owner[start : start + size] = 0
        for warp in self.warps:
            self.cluster.program.give_back(warp.registers)


class Warp:
    def __init__(self, block: Block, first: int):
        self.block, self.cluster, self.program = block, block.cluster, block.cluster.program
        self.parameters, self.inexact = self.cluster.parameters, self.cluster.inexact
        self.registers = self.program.registers()
        self.rows = self.registers.rows
        self.all_lanes = np.arange(LANES)
        self.alive = np.ones(LANES, bool)  # lanes that have not ended
        self.threads = block.rank * block.threads + first + self.all_lanes  # of the cluster
        self.groups: dict[int, np.ndarray] = {0: self.alive.copy()}  # instruction -> lanes that come to it next
        self.parked: set[int] = set()  # of `groups`, those that wait for other lanes
        self.waits: int | None = None  # the number of a barrier
        self.at = 0  # where it waits
        # Generation of the cluster's barrier at which a lane has arrived; -1: it need not wait there.
        self.arrived_in = np.full(LANES, -1)
        self._special = {"%tid.x": (first + self.all_lanes).astype("u4"), "%laneid": self.all_lanes.astype("u4")}
        self._special["%warpid"] = np.full(LANES, first // LANES, "u4")

    def special(self, name: str) -> np.ndarray:
        if name not in self._special:
            if name not in self.block.special:
                raise Fault(f"{name} is not known")
            self._special[name] = np.full(LANES, self.block.special[name], "u4")
        return self._special[name]

    def ready(self) -> bool:
        if self.waits is not None or not self.groups:
            return False
        # Lanes that only wait for each other are for `_choose` to say so.
        return len(self.parked) < len(self.groups) or not any(self.program.steps[at].cluster for at in self.parked)

    def locate(self, space: str, addresses: np.ndarray) -> tuple[Memory, Races | None, np.ndarray]:
        """-> memory, who touched it, addresses in it, of lanes that all mean the same space"""
        if space == "generic":
            space = "shared" if addresses[0] < GLOBAL else "global"
            addresses = addresses - GENERIC_SHARED if space == "shared" else addresses
        if space == "shared":  # an address that names no block means this one
            own = (self.block.rank + 1) * self.program.span
            addresses = np.where(addresses < SHARED + self.program.span, addresses + own, addresses)
        return *self.cluster.memories[space], addresses

    def of_block(self, addresses: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Addresses of shared memory -> the same variables in another block of the cluster"""
        if (rank >= len(self.cluster.blocks)).any():
            raise Fault(f"a cluster of {len(self.cluster.blocks)} has no block {int(rank.max())}")
        return SHARED + (addresses - SHARED) % self.program.span + (rank + 1) * self.program.span

    def advance(self, count: int, draw: random.Random) -> None:
        """One group of lanes, for `count` instructions or until it parts, ends, waits or meets another."""
        at = self._choose(draw)
        mask = self.groups.pop(at)
        full = mask.tobytes() == ALL_BYTES
        steps, predicates = self.program.steps, self.rows["pred"]
        for _ in range(count):
            if self.groups and at in self.groups:
                mask = mask | self.groups.pop(at)
                self.parked.discard(at)
                full = mask.tobytes() == ALL_BYTES
            step = steps[at]
            active, every = mask, full
            if step.guard is not None:
                holds = predicates[step.guard]
                active = mask & (~holds if step.negated else holds)
                every = active.tobytes() == ALL_BYTES
            if step.cluster is not None:
                if (step.aligned and not self._all_here(step, mask)) or not self._at_cluster(step, mask):
                    self._wait_at(at, mask)
                    self.parked.add(at)
                    return
                at += 1
            elif step.execute is not None and step.members is None:
                if every or step.guard is None or active.any():
                    try:
                        step.execute(self, None if every else active)
                    except Fault as fault:
                        raise step.instruction.fault(fault) from None
                at += 1
            elif step.ends or step.target is not None:
                mask, at = self._part(step, mask, active, at)
                if mask is None:
                    return
                full = mask.tobytes() == ALL_BYTES
            elif not self._all_here(step, active):
                self._wait_at(at, mask)
                self.parked.add(at)
                return
            elif step.barrier is not None:
                self.waits, self.at, self.groups[at + 1] = step.barrier[0], at, mask
                return
            else:
                if step.execute is not None:
                    step.execute(self, None if every else active)
                elif self.cluster.clocks is not None:  # bar.warp.sync
                    self.cluster.clocks.meet(self.threads[active])
                at += 1
        self._wait_at(at, mask)

    def _at_cluster(self, step: Step, mask: np.ndarray) -> bool:
        try:
            if step.cluster == "wait":
                return self.cluster.passed(self, mask, step.ordered)
            self.cluster.arrive(self, mask, step.ordered)
            return True
        except Fault as fault:
            raise step.instruction.fault(fault) from None

    def _part(self, step: Step, mask: np.ndarray, active: np.ndarray, at: int) -> tuple[Any, int]:
        """A branch or an end for the active of these lanes -> lanes and where they go on; None: groups that are chosen from anew"""
        rest = mask & ~active
        if step.ends:
            self.alive = self.alive & ~active
            self.parked.clear()  # who waited for them need not
            return (rest if rest.any() else None), at + 1
        if not active.any():
            return mask, at + 1
        assert step.target is not None
        if not rest.any():
            return mask, step.target
        self._wait_at(at + 1, rest)
        self._wait_at(step.target, active)
        return None, at

    def _wait_at(self, at: Any, lanes: np.ndarray) -> None:
        self.groups[at] = lanes | self.groups[at] if at in self.groups else lanes
        self.parked.discard(at)

    def _all_here(self, step: Step, mask: np.ndarray) -> bool:
        wanted = self.alive if step.members is None else self.alive & step.members(self, mask)
        if (mask & ~wanted).any():
            raise step.instruction.fault("lanes come here that do not take part")
        return bool((mask == wanted).all())

    def _choose(self, draw: random.Random) -> int:
        free = sorted(self.groups.keys() - self.parked)
        if not free:
            steps = self.program.steps
            lines = ", ".join(str(steps[at].instruction.line) for at in sorted(self.groups))
            raise Fault(f"lanes of one warp wait for each other at different instructions, PTX lines {lines}")
        return free[0] if draw.random() < 0.75 else draw.choice(free)
