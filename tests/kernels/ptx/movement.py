"""Data between registers, memory and lanes (PTX ISA, 9.7.9 "Data Movement": mov, ld, st, shfl.sync, cvta, mapa; 9.7.13 vote)."""

from typing import Any

import numpy as np

from ptx.opcodes import LANES, TYPES, Execute, Operation, decoder
from ptx.text import SIZES, Address, Operand, Pair, Register, Symbol, Vector

GENERIC_SHARED = 0x6E00_0000_0000  # what a generic address of shared memory is above the other
# What a load or store says of caches and order, and which this memory, where each access is seen at once, always honours.
HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "relaxed", "volatile", "cta", "gpu", "sys")
HINTS += tuple(f"L1::{hint}" for hint in ("evict_first", "evict_last", "evict_normal", "no_allocate"))
HINTS += ("L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last")


@decoder("mov")
def _move(operation: Operation) -> Execute:
    kind = operation.type()
    operation.wants(2)
    target, source = operation.operands
    if isinstance(source, Vector):
        return _pack(operation, kind, target, source)
    if isinstance(target, Vector):
        return _unpack(operation, kind, target, source)
    return operation.compute(lambda a: a, kind)


def _pack(operation: Operation, kind: str, target: Operand, source: Vector) -> Execute:
    """The first part lies in the lowest bits."""
    whole = TYPES[kind]
    width = whole.itemsize * 8 // len(source.parts)
    put, gets = operation.put(target, kind), [operation.get(part, f"b{width}") for part in source.parts]

    def execute(warp: Any, mask: Any) -> None:
        found = np.zeros(LANES, whole)
        for position, get in enumerate(gets):
            found |= get(warp).astype(whole) << whole.type(width * position)
        put(warp, found, mask)

    return execute


def _unpack(operation: Operation, kind: str, target: Vector, source: Operand) -> Execute:
    whole = TYPES[kind]
    width = whole.itemsize * 8 // len(target.parts)
    get, puts = operation.get(source, kind), [operation.put(part, f"b{width}") for part in target.parts]
    narrow = TYPES[f"b{width}"]

    def execute(warp: Any, mask: Any) -> None:
        value = get(warp).copy()
        for position, put in enumerate(puts):
            put(warp, (value >> whole.type(width * position)).astype(narrow), mask)

    return execute


def _access(operation: Operation) -> tuple[str, str, int]:
    """-> space, type of an element, elements of a vector"""
    while operation.take(*HINTS):
        pass
    kind = operation.type(*SIZES)
    count = int((operation.take("v2", "v4", "v8") or "v1")[1:])
    space = operation.take("global", "shared", "shared::cta", "shared::cluster", "param") or "generic"
    if space == "generic" and operation.take("local", "const", "param::entry", "param::func"):
        raise operation.fault("only the spaces .global, .shared and .param are known")
    return space.partition("::")[0], kind, count


def _address(operation: Operation, address: Operand) -> Any:
    """-> (warp) -> (32,) int64"""
    if not isinstance(address, Address):
        raise operation.fault("no address")
    offset, base = address.offset, address.base
    if isinstance(base, Register) and base.width in (32, 64):
        get = operation.get(base, f"u{base.width}")
        return lambda warp: get(warp).astype(np.int64) + offset
    if isinstance(base, Symbol) and base.name in operation.symbols:
        constant = np.full(LANES, operation.symbols[base.name] + offset, np.int64)
        return lambda warp: constant
    raise operation.fault(f"the address {base} is not known here")


@decoder("ld")
def _load(operation: Operation) -> Execute:
    operation.wants(2)
    space, kind, count = _access(operation)
    target, address = operation.operands
    parts = operation.parts(target)
    if len(parts) != count:
        raise operation.fault(f"{count} registers wanted")
    puts, dtype = [operation.put(part, kind) for part in parts], TYPES[kind]
    size = dtype.itemsize
    if space == "param":
        return _load_parameter(operation, puts, dtype, address)
    at = _address(operation, address)

    def execute(warp: Any, mask: Any) -> None:
        lanes = warp.all_lanes if mask is None else np.flatnonzero(mask)
        memory, races, addresses = warp.locate(space, at(warp)[lanes])
        places = memory.places(addresses, size * count, writing=False)
        if races is not None:
            races.saw(places, size * count, warp.threads[lanes], writing=False)
        for position, put in enumerate(puts):
            value = np.zeros(LANES, dtype)
            value[lanes] = memory.load(places + position * size, size).view(dtype)
            put(warp, value, mask)

    return execute


def _load_parameter(operation: Operation, puts: list, dtype: np.dtype, address: Operand) -> Execute:
    base = address.base if isinstance(address, Address) else None
    if not isinstance(base, Symbol) or base.name not in operation.parameters or not isinstance(address, Address):
        raise operation.fault("the parameter is not known")
    name, offset = base.name, address.offset
    if offset + len(puts) * dtype.itemsize > operation.parameters[name]:
        raise operation.fault(f"the parameter has {operation.parameters[name]} bytes")

    def execute(warp: Any, mask: Any) -> None:
        values = np.frombuffer(warp.parameters[name], dtype, len(puts), offset)
        for put, value in zip(puts, values, strict=True):
            put(warp, np.full(LANES, value), mask)

    return execute


@decoder("st")
def _store(operation: Operation) -> Execute:
    operation.wants(2)
    space, kind, count = _access(operation)
    address, source = operation.operands
    parts = operation.parts(source)
    if space == "param" or len(parts) != count:
        raise operation.fault(f"{count} registers into .global or .shared wanted")
    at, gets, size = _address(operation, address), [operation.get(part, kind) for part in parts], SIZES[kind]

    def execute(warp: Any, mask: Any) -> None:
        lanes = warp.all_lanes if mask is None else np.flatnonzero(mask)
        memory, races, addresses = warp.locate(space, at(warp)[lanes])
        places = memory.places(addresses, size * count, writing=True)
        if races is not None:
            races.saw(places, size * count, warp.threads[lanes], writing=True)
        for position, get in enumerate(gets):
            memory.store(places + position * size, size, get(warp).view(f"u{size}")[lanes])

    return execute


@decoder("cvta")
def _to_generic(operation: Operation) -> Execute:
    """Generic addresses are those of the global space, and those of shared memory with `GENERIC_SHARED` added."""
    back = operation.take("to")
    space, kind = operation.take("global", "shared", "shared::cta"), operation.type("u64")
    if space is None:
        raise operation.fault("only the spaces .global and .shared are known")
    if space == "global":
        return operation.compute(lambda a: a, kind)
    put, get = operation.put(operation.operands[0], kind), operation.get(operation.operands[1], kind)

    def execute(warp: Any, mask: Any) -> None:
        address = get(warp).astype(np.int64)
        found = address - GENERIC_SHARED if back else warp.locate("shared", address)[2] + GENERIC_SHARED
        put(warp, found.astype(np.uint64), mask)

    return execute


@decoder("mapa")
def _in_another_block(operation: Operation) -> Execute:
    """mapa d, a, b: the address of a's variable in block b of the cluster; generic, or of .shared::cluster"""
    generic = operation.take("shared::cluster") is None
    kind = operation.type("u64") if generic else operation.type("u32", "u64")
    operation.wants(3)
    put, get = operation.put(operation.operands[0], kind), operation.get(operation.operands[1], kind)
    rank = operation.get(operation.operands[2], "u32")
    above, dtype = GENERIC_SHARED if generic else 0, TYPES[kind]

    def execute(warp: Any, mask: Any) -> None:
        blocks = rank(warp).astype(np.int64) if mask is None else np.where(mask, rank(warp), 0).astype(np.int64)
        put(warp, (warp.of_block(get(warp).astype(np.int64) - above, blocks) + above).astype(dtype), mask)

    return execute


def member_lanes(operation: Operation, operand: Operand) -> Any:
    """A membermask -> (warp, mask) -> (32,) bool: the lanes that it names, which all that come must agree on"""
    get, bits = operation.get(operand, "u32"), np.arange(LANES, dtype=np.uint32)

    def members(warp: Any, mask: Any) -> np.ndarray:
        given = get(warp)[mask]
        if (given != given[0]).any():
            raise operation.fault("lanes name different lanes to wait for")
        return (given[0] >> bits & np.uint32(1)).astype(bool)

    return members


@decoder("shfl")
def _shuffle(operation: Operation) -> Execute:
    """A lane that takes no part gives what is never a number; lanes out of range keep their own, and the predicate says so."""
    operation.wants(5)
    operation.type("b32")
    if not operation.take("sync"):
        raise operation.fault("shfl without sync is of earlier machines")
    mode = operation.take("up", "down", "bfly", "idx")
    if mode is None:
        raise operation.fault("up, down, bfly or idx wanted")
    target, value, *numbers = operation.operands
    target, inside = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    put, get = operation.put(target, "b32"), operation.get(value, "b32")
    put_inside = None if inside is None else operation.put(inside, "pred")
    member_lanes(operation, numbers.pop())  # they are all here when this executes
    by, limit = (operation.get(number, "s32") for number in numbers)
    lane = np.arange(LANES)

    def execute(warp: Any, mask: Any) -> None:
        step, clamp, segment = by(warp) & 31, limit(warp) & 31, limit(warp) >> 8 & 31
        lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
        other = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": lowest | (step & ~segment)}[mode]
        valid = other >= highest if mode == "up" else other <= highest
        other = np.where(valid, other, lane)
        found = get(warp)[other]
        if mask is not None:
            found = np.where(mask[other], found, np.uint32(0xFFFFBEEF))
        put(warp, found, mask)
        if put_inside is not None:
            put_inside(warp, valid, mask)

    return execute


@decoder("vote")
def _vote(operation: Operation) -> Execute:
    operation.wants(3)
    kind = operation.type("pred", "b32")
    how = operation.take("all", "any", "uni") if kind == "pred" else operation.take("ballot")
    if not operation.take("sync") or how is None:
        raise operation.fault("vote.sync.all, any, uni or ballot wanted")
    put, get = operation.put(operation.operands[0], kind), operation.get(operation.operands[1], "pred")
    member_lanes(operation, operation.operands[2])
    weights = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def execute(warp: Any, mask: Any) -> None:
        votes = get(warp)
        yes = votes if mask is None else votes[mask]
        if how == "ballot":
            found = np.full(LANES, weights[votes if mask is None else votes & mask].sum(dtype=np.uint32))
        else:
            holds = {"all": yes.all(), "any": yes.any(), "uni": yes.all() or not yes.any()}[how]
            found = np.full(LANES, bool(holds))
        put(warp, found, mask)

    return execute
