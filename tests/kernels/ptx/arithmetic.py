"""Arithmetic, comparison and logic (PTX ISA, 9.7.1 "Integer", 9.7.3 "Floating Point", 9.7.6 "Comparison and Selection", 9.7.8 "Logic")."""

from collections.abc import Callable

import numpy as np

from ptx import rounding
from ptx.opcodes import TYPES, Execute, Operation, decoder
from ptx.text import Pair

WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _modified(operation: Operation, kind: str, function: Callable) -> Callable:
    """With .ftz and .sat where they are written."""
    ftz, sat = operation.take("ftz"), operation.take("sat")
    if (ftz or sat) and kind != "f32":
        raise operation.fault("ftz and sat are for float32")

    def modified(*x: np.ndarray) -> np.ndarray:
        found = function(*(rounding.flushed(each) for each in x)) if ftz else function(*x)
        found = rounding.flushed(found) if ftz else found
        return rounding.saturated(found) if sat else found

    return modified if ftz or sat else function


def _rounding(operation: Operation, kind: str) -> str:
    mode = operation.take("rn", "rz", "rm", "rp") or "rn"
    if mode != "rn" and kind != "f32":
        raise operation.fault(f"rounding .{mode} of .{kind} is not known")
    return mode


@decoder("add", "sub", "mul")
def _sum_or_product(operation: Operation) -> Execute:
    kind = operation.type()
    if TYPES[kind].kind in "ui":
        if operation.base == "mul":
            return operation.compute(*_product(operation, kind))
        return operation.compute({"add": np.add, "sub": np.subtract}[operation.base], kind)
    if kind not in ("f32", "f64"):
        raise operation.fault(f"the type .{kind} is not known here")
    mode = _rounding(operation, kind)
    if kind == "f64" or mode == "rn":
        plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.base]
    else:
        one = {"add": rounding.add32, "sub": lambda a, b, m: rounding.add32(a, -b, m), "mul": rounding.mul32}
        of = one[operation.base]

        def plain(a, b):
            return of(a, b, mode)

    return operation.compute(_modified(operation, kind, plain), kind)


def _product(operation: Operation, kind: str) -> tuple:
    """-> function, type of the result, types of the factors"""
    how = operation.take("wide", "lo", "hi")
    if how == "lo":
        return np.multiply, kind, kind, kind
    if kind not in WIDE:
        raise operation.fault(f"a product of .{kind} that is not .lo is not known")
    wide = TYPES[WIDE[kind]]
    if how == "wide":
        return (lambda a, b: a.astype(wide) * b.astype(wide)), WIDE[kind], kind, kind
    if how is None:
        raise operation.fault("a product of integers is lo, hi or wide")
    bits, narrow = wide.type(TYPES[kind].itemsize * 8), TYPES[kind]
    return (lambda a, b: (a.astype(wide) * b.astype(wide) >> bits).astype(narrow)), kind, kind, kind


@decoder("fma", "mad")
def _multiply_add(operation: Operation) -> Execute:
    kind = operation.type()
    if TYPES[kind].kind in "ui":
        times, result, *factors = _product(operation, kind)
        return operation.compute(lambda a, b, c: times(a, b) + c, result, *factors, result)
    mode = _rounding(operation, kind)
    if kind == "f64":
        return operation.compute(rounding.fma64, kind)
    if kind != "f32":
        raise operation.fault(f"the type .{kind} is not known here")
    return operation.compute(_modified(operation, kind, lambda a, b, c: rounding.fma32(a, b, c, mode)), kind)


@decoder("div", "rcp", "sqrt")
def _quotient_or_root(operation: Operation) -> Execute:
    kind = operation.type()
    if TYPES[kind].kind in "ui":
        return operation.compute(_integer_quotient, kind)
    one = TYPES[kind].type(1)
    exact = {"div": np.divide, "rcp": lambda a: one / a, "sqrt": np.sqrt}[operation.base]
    if operation.take("rn"):
        return operation.compute(_modified(operation, kind, exact), kind)
    # div.full: 2 ulp over the full range; rcp.approx: 1 ulp; the bounds in units of the value itself.
    if operation.base == "div" and operation.take("full"):
        return _approximate(operation, kind, np.divide, 2 * 2.0**-23)
    if operation.base == "rcp" and operation.take("approx"):
        return _approximate(operation, kind, lambda a: 1 / a, 2.0**-23)
    raise operation.fault("only .rn, div.full and rcp.approx are known")


@decoder("ex2", "lg2", "tanh")
def _transcendental(operation: Operation) -> Execute:
    """ex2: 2^-22 of the value, 1 at 0. lg2 (2^-22 of the value, absolute in [1/2, 2]) and tanh (2^-11) are not used here, so unknown."""
    kind = operation.type("f32")
    if operation.base != "ex2" or not operation.take("approx"):
        raise operation.fault("only ex2.approx is known")
    return _approximate(operation, kind, np.exp2, 2.0**-22, exact_at_zero=True)


def _approximate(operation: Operation, kind: str, function: Callable, bound: float, exact_at_zero=False) -> Execute:
    if kind != "f32":
        raise operation.fault("approximations are of float32")
    of = rounding.approximated(function, bound, exact_at_zero)
    ftz = operation.take("ftz") is not None
    put, gets = operation.put(operation.operands[0], kind), [operation.get(x, kind) for x in operation.operands[1:]]

    def execute(warp, mask):
        x = [get(warp) for get in gets]
        found = of(warp.inexact, *(map(rounding.flushed, x) if ftz else x))
        put(warp, rounding.flushed(found) if ftz else found, mask)

    return execute


def _integer_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Toward 0; by 0, which PTX leaves open, all ones."""
    safe = np.where(b == 0, a.dtype.type(1), b)
    down = a // safe
    inexact = (a % safe != 0) & ((a < 0) != (safe < 0))
    return np.where(b == 0, ~a.dtype.type(0), down + inexact.astype(a.dtype))


@decoder("abs", "neg")
def _sign(operation: Operation) -> Execute:
    kind = operation.type("s16", "s32", "s64", "f32", "f64")
    function = {"abs": np.abs, "neg": np.negative}[operation.base]
    return operation.compute(_modified(operation, kind, function), kind)


@decoder("copysign")
def _copysign(operation: Operation) -> Execute:
    """copysign d, a, b: the sign of a with the size of b"""
    return operation.compute(lambda a, b: np.copysign(b, a), operation.type("f32", "f64"))


@decoder("min", "max")
def _extreme(operation: Operation) -> Execute:
    kind, larger = operation.type(), operation.base == "max"
    if TYPES[kind].kind in "ui":
        return operation.compute(np.maximum if larger else np.minimum, kind)
    nan = operation.take("NaN") is not None
    of = _modified(operation, kind, lambda a, b: rounding.extreme(a, b, larger, nan))
    return operation.compute(of, kind)


COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # ordered: false of a NaN
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARISONS |= {
    "equ": lambda a, b: ~((a < b) | (a > b)),  # unordered: true of a NaN
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@decoder("setp")
def _compare(operation: Operation) -> Execute:
    kind = operation.type()
    name = operation.take(*COMPARISONS)
    if name is None or (TYPES[kind].kind != "f" and name not in ("eq", "ne", "lt", "le", "gt", "ge")):
        raise operation.fault(f"the comparison of .{kind} is not known")
    if kind.startswith("b") and name not in ("eq", "ne"):
        raise operation.fault("bits are equal or not")
    compare = _flushing_operands(operation, COMPARISONS[name])
    combined = operation.take(*COMBINED)
    operation.wants(3 if combined is None else 4)
    target = operation.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    put = operation.put(first, "pred")
    put_second = None if second is None else operation.put(second, "pred")
    a, b = (operation.get(operand, kind) for operand in operation.operands[1:3])
    c = None if combined is None else operation.get(operation.operands[3], "pred")

    def execute(warp, mask):
        holds = compare(a(warp), b(warp))
        fails = None if put_second is None else ~holds
        if c is not None and combined is not None:
            also = c(warp).copy()
            holds = COMBINED[combined](holds, also)
            fails = None if fails is None else COMBINED[combined](fails, also)
        put(warp, holds, mask)
        if put_second is not None and fails is not None:
            put_second(warp, fails, mask)

    return execute


def _flushing_operands(operation: Operation, compare: Callable) -> Callable:
    if operation.take("ftz") is None:
        return compare
    return lambda a, b: compare(rounding.flushed(a), rounding.flushed(b))


@decoder("selp")
def _select(operation: Operation) -> Execute:
    kind = operation.type()
    return operation.compute(lambda a, b, p: np.where(p, a, b), kind, kind, kind, "pred")


@decoder("and", "or", "xor", "not")
def _logic(operation: Operation) -> Execute:
    kind = operation.type("pred", "b16", "b32", "b64")
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    return operation.compute(functions[operation.base], kind)


@decoder("shl", "shr")
def _shift(operation: Operation) -> Execute:
    """By 32 bits of a count, at most the width: then zeros are left, or signs."""
    kind, left = operation.type(), operation.base == "shl"
    width, signed = TYPES[kind].itemsize * 8, kind.startswith("s")

    def shifted(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        within = np.minimum(count, width - 1).astype(a.dtype)
        found = a << within if left else a >> within
        return found if signed and not left else np.where(count < width, found, a.dtype.type(0))

    return operation.compute(shifted, kind, kind, "u32")


@decoder("bfe")
def _bits_of_field(operation: Operation) -> Execute:
    kind = operation.type("u32")

    def field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = position & 0xFF, np.minimum(length & 0xFF, 32)
        ones = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
        return ((a.astype(np.uint64) >> np.minimum(position, 63).astype(np.uint64)) & ones).astype(np.uint32)

    return operation.compute(field, kind)


@decoder("prmt")
def _permute(operation: Operation) -> Execute:
    """Four of the eight bytes of {b, a}; a selector with its high bit takes the byte's sign eight times."""

    def permuted(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.zeros_like(a)
        for position in range(4):
            selector = selectors >> np.uint32(4 * position) & np.uint32(15)
            byte = (both >> (selector & 7).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte > 127, np.uint32(255), np.uint32(0))
            found |= np.where(selector > 7, sign, byte) << np.uint32(8 * position)
        return found

    return operation.compute(permuted, operation.type("b32"))


@decoder("lop3")
def _logic_of_three(operation: Operation) -> Execute:
    """Bit 4 a + 2 b + c of the table for each three bits."""

    def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        found = np.zeros_like(a)
        for row in range(8):
            bits = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            found |= np.where(table >> np.uint32(row) & np.uint32(1), bits, np.uint32(0))
        return found

    return operation.compute(looked_up, operation.type("b32"))
