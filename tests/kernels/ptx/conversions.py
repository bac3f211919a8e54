"""cvt (PTX ISA, 9.7.9.21 "cvt", 6.5 "Type Conversion")."""

from collections.abc import Callable

import numpy as np

from ptx import rounding
from ptx.opcodes import TYPES, Execute, Operation, decoder

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
NARROW = {"bf16": rounding.bf16_bits, "f16": rounding.f16_bits}
FLOATS = ("f16", "bf16", "f32", "f64")


@decoder("cvt")
def _convert(operation: Operation) -> Execute:
    source = operation.type(*TYPES, "bf16")
    target = operation.type(*TYPES, "bf16", "bf16x2", "f16x2")
    if target in ("bf16x2", "f16x2"):
        return _packed(operation, target, source)
    if source in FLOATS and target in FLOATS:
        function = _float_to_float(operation, source, target)
    elif source in FLOATS:
        function = _float_to_integer(operation, source, target)
    elif target in FLOATS:
        if target not in ("f32", "f64") or not operation.take("rn"):
            raise operation.fault(f"a conversion from .{source} to .{target} is by .rn to f32 or f64")
        to = TYPES[target]
        function = lambda x: x.astype(to)  # noqa: E731
    else:
        to = TYPES[target]
        function = lambda x: x.astype(to)  # noqa: E731
    # A half is seen as its 16 bits where the register is one of bits, which all are.
    return operation.compute(function, "b16" if target == "f16" else target, "b16" if source == "f16" else source)


def _float_to_float(operation: Operation, source: str, target: str) -> Callable:
    widen = {"bf16": rounding.from_bf16, "f16": lambda bits: bits.view(np.float16).astype(np.float32)}
    if source in widen and target == "f32":
        return widen[source]
    if source == "f32" and target in NARROW:
        if not operation.take("rn"):
            raise operation.fault("only .rn is known")
        return NARROW[target]
    if source not in ("f32", "f64") or target not in ("f32", "f64"):
        raise operation.fault(f"from .{source} to .{target} is not known")
    ftz, sat = operation.take("ftz"), operation.take("sat")
    whole = operation.take(*TO_INTEGER)
    if source == "f64" and target == "f32" and not operation.take("rn"):
        raise operation.fault("only .rn is known")
    to = TYPES[target]

    def converted(x: np.ndarray) -> np.ndarray:
        x = rounding.flushed(x) if ftz and source == "f32" else x
        x = TO_INTEGER[whole](x) if whole else x
        x = x.astype(to)
        x = rounding.flushed(x) if ftz and target == "f32" else x
        return rounding.saturated(x) if sat else x

    return converted


def _float_to_integer(operation: Operation, source: str, target: str) -> Callable:
    """To the nearest that the type has; a NaN to 0, or to the highest bit alone where either side has 64 bits."""
    if source not in ("f32", "f64"):
        raise operation.fault(f"from .{source} to .{target} is not known")
    how = operation.take(*TO_INTEGER)
    if how is None:
        raise operation.fault("a float becomes an integer by rni, rzi, rmi or rpi")
    ftz, to = operation.take("ftz"), TYPES[target]
    limits = np.iinfo(to)
    wide = "64" in source + target
    nan = to.type(0) if not wide else np.array(1 << (limits.bits - 1), f"u{to.itemsize}").view(to)[()]

    def converted(x: np.ndarray) -> np.ndarray:
        x = TO_INTEGER[how]((rounding.flushed(x) if ftz else x).astype(np.float64))
        low, high = x <= float(limits.min), x >= float(limits.max)
        found = np.where(low | high | np.isnan(x), 0.0, x).astype(to)
        found = np.where(low, to.type(limits.min), np.where(high, to.type(limits.max), found))
        return np.where(np.isnan(x), nan, found)

    return converted


def _packed(operation: Operation, target: str, source: str) -> Execute:
    """cvt.rn.bf16x2.f32 d, a, b: a into the upper half, b into the lower"""
    if source != "f32" or not operation.take("rn"):
        raise operation.fault("only .rn from .f32 is known")
    relu = operation.take("relu")
    narrow = NARROW[target.removesuffix("x2")]

    def half(x: np.ndarray) -> np.ndarray:
        x = rounding.extreme(x, np.zeros_like(x), larger=True, nan=True) if relu else x
        return narrow(x).astype(np.uint32)

    return operation.compute(lambda a, b: half(a) << np.uint32(16) | half(b), "b32", "f32", "f32")
