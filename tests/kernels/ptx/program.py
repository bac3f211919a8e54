"""An entry, each instruction decoded once (PTX ISA, 9.7.12 "Control Flow", 9.7.13 "Parallel Synchronization and Communication")."""

import copy
from collections.abc import Collection
from typing import Any

# They enter their decoders.
from ptx import arithmetic, conversions, movement  # noqa: F401
from ptx.memory import GUARD, Memory
from ptx.opcodes import Execute, Operation, Registers, decode
from ptx.text import Instruction, Literal, Negated, Symbol, parse

SHARED = 0x100  # where shared memory begins


class Step:
    """An instruction, decoded: it computes, or it says what becomes of the lanes."""

    def __init__(self, instruction: Instruction, program: "Program"):
        operation = Operation(instruction, program.symbols, program.entry.parameters)
        self.instruction = instruction
        self.execute: Execute | None = None
        self.target: int | None = None  # of a branch
        self.barrier: tuple[int, int | None] | None = None  # number, threads that it waits for
        self.cluster: str | None = None  # arrive or wait, at the barrier of a cluster
        self.ordered = self.aligned = False  # of that barrier: release and acquire; all lanes of the warp together
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
        """bar{.cta}.sync a{, b} and its long name barrier{.cta}.sync.aligned; bar.warp.sync; barrier.cluster.arrive and wait"""
        if operation.take("cluster"):
            self.cluster = operation.take("arrive", "wait")
            if self.cluster is None or self.guard is not None:
                raise operation.fault("arrive or wait wanted, under no predicate")
            self.ordered = (
                operation.take("relaxed") is None
            )  # release and acquire are what is meant where neither is written
            operation.take("release" if self.cluster == "arrive" else "acquire")
            self.aligned = operation.take("aligned") is not None
            return
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
        self.sizes = {name: size or dynamic for name, (size, _) in self.entry.shared.items()}
        self.span = GUARD + sum(-(-size // GUARD) * GUARD + GUARD for size in self.sizes.values())
        memory = Memory(SHARED, 2 * self.span)
        self.place_shared(memory, 0)
        starts = {name: memory.spans[f"{name} of block 0"][0] for name, size in self.sizes.items() if size}
        self.symbols = {name: SHARED + start - self.span for name, start in starts.items()}
        self.steps = [Step(instruction, self) for instruction in self.entry.instructions]
        last = self.steps[-1]
        if not (last.ends or last.target is not None) or last.guard is not None:
            raise last.instruction.fault("the code goes on behind its end")
        self._counts = {width: self.entry.count(width) for width in (1, 16, 32, 64)}
        self._spare: list[Registers] = []  # of warps that have ended: many thousand views are slow to make

    def registers(self) -> Registers:
        found = self._spare.pop() if self._spare else Registers(self._counts)
        found.forget()
        return found

    def give_back(self, registers: Registers) -> None:
        self._spare.append(registers)

    def without(self, lines: Collection[int]) -> "Program":
        """The same, but for the instructions of these lines, which are left out."""
        other = copy.copy(self)
        other.steps = [copy.copy(step) for step in self.steps]
        left_out = [step for step in other.steps if step.instruction.line in lines]
        assert len(left_out) == len(set(lines)), "each line has one instruction"
        for step in left_out:
            step.guard = step.target = step.barrier = step.members = step.cluster = None
            step.ends, step.execute = False, lambda warp, mask: None
        return other

    def place_shared(self, memory: Memory, block: int) -> None:
        """The variables of a block: those of the one with rank b lie (b + 1) spans behind the addresses in `symbols`."""
        memory.end = (block + 1) * self.span + GUARD
        for name, size in self.sizes.items():
            if size:
                memory.place(f"{name} of block {block}", size)
