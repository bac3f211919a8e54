"""Floating point as PTX writes it: the rounding that is named, subnormal numbers flushed or not, NaNs (PTX ISA, 9.7.3 "Floating Point")."""

import ctypes
import ctypes.util
from collections.abc import Callable

import numpy as np

CANONICAL_NAN = np.uint32(0x7FFFFFFF)
SMALLEST_NORMAL = np.float32(2.0**-126)
MIDDLE_MASK, MIDDLE = np.uint64((1 << 29) - 1), np.uint64(1 << 28)  # of the bits that a float64 has more than a float32


def flushed(x: np.ndarray) -> np.ndarray:
    """.ftz: float32 subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def saturated(x: np.ndarray) -> np.ndarray:
    """.sat: into [0, 1], a NaN to 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def _to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64 with the last bit as a sticky one: what rounds once more, to fewer bits, is as if rounded once."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.uint64) & np.uint64(1) == 0)
    return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def _narrow(x: np.ndarray, mode: str) -> np.ndarray:
    """float64 (odd in its last bit where inexact) -> float32 by rn, rz, rm or rp."""
    nearest = x.astype(np.float32)
    if mode == "rn":
        return nearest
    wide = nearest.astype(np.float64)
    down = np.where(wide > x, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    up = np.where(wide < x, np.nextafter(nearest, np.float32(np.inf)), nearest)
    return {"rm": down, "rp": up, "rz": np.where(x > 0, down, up)}[mode]


def add32(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return a + b if mode == "rn" else _narrow(_to_odd(a.astype(np.float64), b.astype(np.float64)), mode)


def mul32(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return a * b if mode == "rn" else _narrow(a.astype(np.float64) * b, mode)  # 48 bits: exact


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str) -> np.ndarray:
    product = a.astype(np.float64) * b  # exact
    if mode == "rn":
        total = product + c
        # Rounded to float64 first, a sum goes elsewhere only from the middle of two float32s, or where these are further apart.
        middle = total.view(np.uint64) & MIDDLE_MASK == MIDDLE
        if not (middle | ((np.abs(total) < SMALLEST_NORMAL) & (total != 0))).any():
            return total.astype(np.float32)
    return _narrow(_to_odd(product, c.astype(np.float64)), mode)


_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_fma.argtypes, _fma.restype = [ctypes.c_double] * 3, ctypes.c_double


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.array([_fma(*each) for each in zip(a, b, c, strict=True)])


def extreme(a: np.ndarray, b: np.ndarray, larger: bool, nan: bool) -> np.ndarray:
    """min and max: of a number and a NaN the number, or with .NaN the NaN; +0 above -0; two NaNs make the canonical one."""
    found = np.fmax(a, b) if larger else np.fmin(a, b)
    zeros = (a == 0) & (b == 0)
    negative = (np.signbit(a) & np.signbit(b)) if larger else (np.signbit(a) | np.signbit(b))
    found = np.where(zeros, np.where(negative, a.dtype.type(-0.0), a.dtype.type(0.0)), found)
    is_nan = (np.isnan(a) | np.isnan(b)) if nan else (np.isnan(a) & np.isnan(b))
    return canonical(np.where(is_nan, a.dtype.type(np.nan), found))


def canonical(x: np.ndarray) -> np.ndarray:
    """float32: each NaN as 0x7fffffff; other types as they are."""
    if x.dtype != np.float32:
        return x
    return np.where(np.isnan(x), CANONICAL_NAN, x.view(np.uint32)).view(np.float32)


def bf16_bits(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 -> the 16 bits of a bfloat16; NaN is 0x7fff."""
    bits = x.view(np.uint32)
    half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) if mode == "rn" else np.uint32(0)
    return np.where(np.isnan(x), np.uint32(0x7FFF), (bits + half) >> np.uint32(16)).astype(np.uint16)


def f16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the 16 bits of a half, to the nearest; NaN is 0x7fff."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def approximated(function: Callable, bound: float, exact_at_zero: bool = False) -> Callable:
    """(salt, x...) -> float32 of the function in float64, off by up to `bound` of itself where there is a salt.

    The error depends on the operands' bits and the salt alone, as a table in hardware does."""

    def of(salt: int | None, *x: np.ndarray) -> np.ndarray:
        exact = function(*(each.astype(np.float64) for each in x))
        if salt is not None:
            mixed = np.full(len(exact), salt, np.uint32)
            for each in x:
                mixed = (mixed ^ each.view(np.uint32)) * np.uint32(2654435761)
                mixed ^= mixed >> np.uint32(15)
            error = bound * (mixed.astype(np.float64) / 2.0**31 - 1.0)
            exact = exact * (1.0 + (np.where(x[0] == 0, 0.0, error) if exact_at_zero else error))
        return exact.astype(np.float32)

    return of
