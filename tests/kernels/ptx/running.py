"""A grid of blocks, the warps of a block in a random order (PTX ISA, 3 "PTX Machine Model", 9.7.12 "Control Flow", 9.7.13.1 bar).

A warp is groups of lanes, each at one instruction. Groups that come to the same instruction are one from there; which group goes on is
drawn, the one that is furthest behind more often than not. A barrier or shuffle waits for all lanes that it names (bar.sync: all of the
warp that have not ended, since it is `aligned`); lanes that wait at different ones are a Fault. Which warp goes on, and for how many
instructions, 1 to 1024, is drawn as well, so that a warp is now and then a loop ahead of another, and now and then a single load.
"""

import copy
import random
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

# They enter their decoders.
from ptx import arithmetic, conversions, movement  # noqa: F401
from ptx.memory import Memory, Races
from ptx.opcodes import LANES, Execute, Operation, Registers, decode
from ptx.text import Fault, Instruction, Literal, Negated, Symbol, parse

GLOBAL, SHARED = 0x7F00_0000_0000, 0x100  # where the address spaces begin
ALL = np.ones(LANES, bool)
ALL_BYTES = ALL.tobytes()


class Step:
    """An instruction, decoded: it computes, or it says what becomes of the lanes."""

    def __init__(self, instruction: Instruction, program: "Program"):
        operation = Operation(instruction, program.symbols, program.entry.parameters)
        self.instruction = instruction
        self.execute: Execute | None = None
        self.target: int | None = None  # of a branch
        self.barrier: tuple[int, int | None] | None = None  # number, threads that it waits for
        self.members: Any = None  # (warp, mask) -> lanes that must be here together
        self.ends = False
        self.guard, self.negated = None, isinstance(instruction.guard, Negated)
        if instruction.guard is not None:
            self.guard = (
                instruction.guard.predicate if isinstance(instruction.guard, Negated) else instruction.guard
            ).index
        base = operation.base
        if base == "bra":
            self.target = self._branch(operation, program)
        elif base in ("ret", "exit"):
            self.ends = True
        elif base in ("bar", "barrier"):
            self._barrier(operation)
        else:
            self.execute = decode(operation)
            if base in ("shfl", "vote"):
                self.members = movement.member_lanes(operation, instruction.operands[-1])
        if operation.left:
            raise operation.fault(f"of its name .{' .'.join(operation.left)} is not known")

    def _branch(self, operation: Operation, program: "Program") -> int:
        operation.take("uni")
        operation.wants(1)
        label = operation.operands[0]
        if not isinstance(label, Symbol) or label.name not in program.entry.labels:
            raise operation.fault("the label is not known")
        return program.entry.labels[label.name]

    def _barrier(self, operation: Operation) -> None:
        """bar{.cta}.sync a{, b} and its long name barrier{.cta}.sync.aligned; bar.warp.sync"""
        warp = operation.take("warp")
        if not operation.take("sync") or (operation.base == "barrier" and not (operation.take("aligned") or warp)):
            raise operation.fault("only bar.sync, barrier.sync.aligned and bar.warp.sync are known")
        operation.take("cta")
        if self.guard is not None:
            raise operation.fault("a barrier under a predicate is not known")
        if warp:
            self.members = movement.member_lanes(operation, operation.operands[0])
            return
        numbers = [int(o.text, 0) for o in operation.operands if isinstance(o, Literal)]
        if len(numbers) != len(operation.operands) or not 1 <= len(numbers) <= 2:
            raise operation.fault("a barrier's number, and of threads, must be written as numbers")
        self.barrier = (numbers[0], numbers[1] if len(numbers) == 2 else None)


class Program:
    """One entry of a PTX file, decoded; `dynamic`: bytes of the shared memory that a launch gives."""

    def __init__(self, source: str, name: str, dynamic: int = 0):
        self.entry = parse(source, name)
        self.dynamic = dynamic
        self.symbols: dict[str, int] = {}
        self.symbols = self.shared_memory()[1]
        self.steps = [Step(instruction, self) for instruction in self.entry.instructions]
        last = self.steps[-1]
        if not (last.ends or last.target is not None) or last.guard is not None:
            raise last.instruction.fault("the code goes on behind its end")
        self.counts = {width: self.entry.count(width) for width in (1, 16, 32, 64)}

    def without(self, lines: Collection[int]) -> "Program":
        """The same, but for the instructions of these lines, which are left out."""
        other = copy.copy(self)
        other.steps = [copy.copy(step) for step in self.steps]
        left_out = [step for step in other.steps if step.instruction.line in lines]
        assert len(left_out) == len(set(lines)), "each line has one instruction"
        for step in left_out:
            step.guard = step.target = step.barrier = step.members = None
            step.ends, step.execute = False, lambda warp, mask: None
        return other

    def shared_memory(self) -> tuple[Memory, dict[str, int]]:
        sizes = {name: size or self.dynamic for name, (size, _) in self.entry.shared.items()}
        memory = Memory(SHARED, sum(-(-size // 256) * 256 + 256 for size in sizes.values()))
        return memory, {name: memory.place(name, size) for name, size in sizes.items() if size}

    def run(
        self,
        memory: Memory,
        arguments: Sequence[bytes],
        blocks: int,
        threads: int,
        seed: int,
        inexact: int | None = None,
        watch: bool = True,
    ) -> None:
        """One block after the other, in a drawn order. `watch`: two threads that race are a Fault. Raises: Fault."""
        sizes = list(self.entry.parameters.values())
        if [len(argument) for argument in arguments] != sizes:
            raise Fault(f"parameters of {sizes} bytes wanted, {[len(argument) for argument in arguments]} given")
        parameters = dict(zip(self.entry.parameters, arguments, strict=True))
        draw = random.Random(seed)
        races = Races(memory) if watch else None
        with np.errstate(all="ignore"):
            for number in draw.sample(range(blocks), blocks):
                Block(self, memory, races, parameters, number, blocks, threads, inexact).run(draw)


class Block:
    def __init__(
        self, program: Program, memory: Memory, races: Races | None, parameters, number, blocks, threads, inexact
    ):
        shared, _ = program.shared_memory()
        self.program, self.parameters, self.inexact, self.threads = program, parameters, inexact, threads
        self.spaces = {"global": (memory, races), "shared": (shared, Races(shared) if races else None)}
        self.special = {"%ctaid.x": number, "%nctaid.x": blocks, "%ntid.x": threads, "%tid.y": 0, "%tid.z": 0}
        self.special |= {"%ctaid.y": 0, "%ctaid.z": 0, "%ntid.y": 1, "%ntid.z": 1, "%nctaid.y": 1, "%nctaid.z": 1}
        self.warps = [Warp(self, first) for first in range(0, threads, LANES)]
        self._next_phase()

    def _next_phase(self) -> None:
        for _, races in self.spaces.values():
            if races is not None:
                races.phase += 1

    def run(self, draw: random.Random) -> None:
        while True:
            ready = [warp for warp in self.warps if warp.groups and warp.waits is None]
            if ready:
                draw.choice(ready).advance(1 << draw.randrange(11), draw)
            elif not self._open_barrier():
                return

    def _open_barrier(self) -> bool:
        """False where all have ended."""
        waiting = [warp for warp in self.warps if warp.waits is not None]
        if not waiting:
            return False
        step = self.program.steps[waiting[0].at]
        assert step.barrier is not None
        number, threads = step.barrier
        here = [warp for warp in waiting if warp.waits == number]
        arrived = sum(int(warp.alive.sum()) for warp in here)
        if arrived != (threads or self.threads):
            raise step.instruction.fault(f"waits for ever: {arrived} of {threads or self.threads} threads came")
        for warp in here:
            warp.waits = None
        self._next_phase()
        return True


class Warp:
    def __init__(self, block: Block, first: int):
        self.block, self.parameters, self.inexact = block, block.parameters, block.inexact
        self.rows = Registers(block.program.counts).rows
        self.all_lanes = np.arange(LANES)
        self.threads = first + self.all_lanes
        self.alive = self.threads < block.threads
        self.groups: dict[int, np.ndarray] = {0: self.alive.copy()}  # instruction -> lanes that come to it next
        self.parked: set[int] = set()  # of `groups`, those that wait for other lanes
        self.waits: int | None = None  # the number of a barrier
        self.at = 0  # where it waits
        self._special = {"%tid.x": self.threads.astype("u4"), "%laneid": self.all_lanes.astype("u4")}
        self._special["%warpid"] = np.full(LANES, first // LANES, "u4")

    def special(self, name: str) -> np.ndarray:
        if name not in self._special:
            if name not in self.block.special:
                raise Fault(f"{name} is not known")
            self._special[name] = np.full(LANES, self.block.special[name], "u4")
        return self._special[name]

    def space(self, name: str) -> Any:
        return self.block.spaces[name]

    def advance(self, count: int, draw: random.Random) -> None:
        """One group of lanes, for `count` instructions or until it parts, ends, waits or meets another."""
        at = self._choose(draw)
        mask = self.groups.pop(at)
        full = mask.tobytes() == ALL_BYTES
        steps, predicates = self.block.program.steps, self.rows["pred"]
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
            if step.execute is not None and step.members is None:
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
                at += 1
        self._wait_at(at, mask)

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
            steps = self.block.program.steps
            lines = ", ".join(str(steps[at].instruction.line) for at in sorted(self.groups))
            raise Fault(f"lanes of one warp wait for each other at different instructions, PTX lines {lines}")
        return free[0] if draw.random() < 0.75 else draw.choice(free)
