"""What instructions have in common: the parts of a name, operands as 32 lanes of a type, results under a mask (PTX ISA, 6 "Operands").

A decoder gets an `Operation` and returns what executes it: (warp, mask) -> None, mask (32,) bool, or None for all lanes. It takes each
part of the name that it honours; a part that nobody took is a Fault, as is a name without a decoder.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.text import Instruction, Literal, Negated, Operand, Register, Special, Symbol, Vector

LANES = 32
TYPES: dict[str, Any] = {f"{kind}{bits}": f"u{bits // 8}" for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)} | {
    f"f{bits}": f"f{bits // 8}" for bits in (16, 32, 64)
}
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()} | {"pred": np.dtype(bool)}
OPAQUE = {"bf16": "b16", "bf16x2": "b32", "f16x2": "b32"}  # types that numpy does not have: as bits

Mask = np.ndarray | None
Get = Callable[[Any], np.ndarray]
Put = Callable[[Any, Any, Mask], None]
Execute = Callable[[Any, Mask], None]
DECODERS: dict[str, Callable[["Operation"], Execute]] = {}


def decoder(*names: str) -> Callable:
    def add(function: Callable[["Operation"], Execute]) -> Callable:
        DECODERS.update(dict.fromkeys(names, function))
        return function

    return add


class Registers:
    """Of a warp. `rows[type][index]`: (32,) of that type, a view of the bits of one register."""

    def __init__(self, counts: dict[int, int]):
        self.rows: dict[str, list[np.ndarray]] = {}
        self._bits = {
            width: np.empty((count, LANES), "bool" if width == 1 else f"u{width // 8}")
            for width, count in counts.items()
        }
        for width, bits in self._bits.items():
            kinds = [name for name, dtype in TYPES.items() if (1 if name == "pred" else dtype.itemsize * 8) == width]
            views = {str(TYPES[name]): list(bits.view(TYPES[name])) for name in kinds}
            self.rows |= {name: views[str(TYPES[name])] for name in kinds}

    def forget(self) -> None:
        """What nothing wrote is a NaN, and no small integer."""
        for width, bits in self._bits.items():
            bits[:] = 1 if width == 1 else (1 << width) - 0x4111


class Operation:
    def __init__(self, instruction: Instruction, symbols: dict[str, int], parameters: dict[str, int]):
        self.instruction = instruction
        self.symbols = symbols  # shared variable -> address
        self.parameters = parameters  # -> bytes
        self.base, *self.left = instruction.name.split(".")
        self.operands = instruction.operands

    def fault(self, problem: str) -> Exception:
        return self.instruction.fault(problem)

    def take(self, *choices: str) -> str | None:
        """The first of these that the name has, which is then accounted for."""
        for choice in choices:
            if choice in self.left:
                self.left.remove(choice)
                return choice
        return None

    def type(self, *allowed: str) -> str:
        """The last part of the name, a type."""
        kind = self.left.pop() if self.left else ""
        if kind not in (allowed or TYPES):
            raise self.fault(f"the type .{kind} is not known here")
        return kind

    def wants(self, count: int) -> None:
        if len(self.operands) != count:
            raise self.fault(f"{count} operands wanted, {len(self.operands)} found")

    def get(self, operand: Operand, kind: str) -> Get:
        """Reads an operand as this type; a register that is wider gives its low bits."""
        kind = OPAQUE.get(kind, kind)
        dtype = TYPES[kind]
        width = 1 if kind == "pred" else dtype.itemsize * 8
        if isinstance(operand, Register):
            index = operand.index
            if operand.width == width:
                return lambda warp: warp.rows[kind][index]
            if operand.width > width > 1 and dtype.kind in "ui":
                wide, low = f"b{operand.width}", TYPES[f"b{width}"]
                return lambda warp: warp.rows[wide][index].astype(low).view(dtype)
            raise self.fault(f"{operand.name} has {operand.width} bits, .{kind} wants {width}")
        if isinstance(operand, Negated):
            index = operand.predicate.index
            return lambda warp: ~warp.rows["pred"][index]
        if isinstance(operand, Special):
            name = operand.name
            if width != 32 or dtype.kind == "f":
                raise self.fault(f"{name} is a number of 32 bits")
            return lambda warp: warp.special(name).view(dtype)
        if isinstance(operand, Literal):
            constant = np.full(LANES, self._bits(operand.text, width, dtype), f"u{dtype.itemsize}").view(dtype)
            constant.flags.writeable = False
            return lambda warp: constant
        if isinstance(operand, Symbol) and operand.name in self.symbols and width in (32, 64):
            constant = np.full(LANES, self.symbols[operand.name], dtype)
            return lambda warp: constant
        raise self.fault(f"the operand {operand} is not known here")

    def _bits(self, text: str, width: int, dtype: np.dtype) -> int:
        if text[:2].lower() in ("0f", "0d"):
            if {"f": 32, "d": 64}[text[1].lower()] != width:
                raise self.fault(f"{text} has not {width} bits")
            return int(text[2:], 16)
        if dtype.kind == "f":
            raise self.fault(f"{text} is not written as bits of a float")
        return int(text.rstrip("U"), 0) % (1 << width)

    def put(self, operand: Operand, kind: str) -> Put:
        """Writes a register; one that is wider gets the sign, or zeros, in its high bits (PTX ISA, 9.4.1)."""
        kind = OPAQUE.get(kind, kind)
        if operand == Symbol("_"):  # nowhere
            return lambda warp, value, mask: None
        if not isinstance(operand, Register):
            raise self.fault("the result is no register")
        index, dtype = operand.index, TYPES[kind]
        width = 1 if kind == "pred" else dtype.itemsize * 8
        if operand.width != width:
            if dtype.kind not in "ui" or operand.width < width or width == 1:
                raise self.fault(f"{operand.name} has {operand.width} bits, .{kind} wants {width}")
            kind = f"{'s' if dtype.kind == 'i' else 'u'}{operand.width}"
        narrow, target = dtype, TYPES[kind]

        def put(warp: Any, value: np.ndarray, mask: Mask) -> None:
            assert value.dtype == narrow, (self.instruction, value.dtype)
            if mask is None:
                warp.rows[kind][index][:] = value
            else:
                np.copyto(warp.rows[kind][index], value.astype(target), where=mask)

        return put

    def parts(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def compute(self, function: Callable, kind: str, *sources: str) -> Execute:
        """first operand = function(the others), which are of type `kind`, or of `sources`"""
        sources = sources or (kind,) * (len(self.operands) - 1)
        self.wants(1 + len(sources))
        put = self.put(self.operands[0], kind)
        gets = [self.get(operand, source) for operand, source in zip(self.operands[1:], sources, strict=True)]
        if len(gets) == 1:
            (a,) = gets
            return lambda warp, mask: put(warp, function(a(warp)), mask)
        if len(gets) == 2:
            a, b = gets
            return lambda warp, mask: put(warp, function(a(warp), b(warp)), mask)
        return lambda warp, mask: put(warp, function(*(get(warp) for get in gets)), mask)


def decode(operation: Operation) -> Execute:
    if operation.base not in DECODERS:
        raise operation.fault("the instruction is not known")
    execute = DECODERS[operation.base](operation)
    if operation.left:
        raise operation.fault(f"of its name .{' .'.join(operation.left)} is not known")
    return execute
