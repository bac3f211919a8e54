"""Buffers with guarded ends in one address space.

An access outside all buffers, across an end, into a read-only buffer or not aligned to its width is a Fault (PTX ISA, 6.4.1: addresses
are naturally aligned; 5.1 for the spaces).
"""

import numpy as np

from ptx.text import Fault

GUARD = 256  # bytes between buffers; what begins a buffer is aligned to it


class Memory:
    def __init__(self, base: int, size: int):
        self.base = base
        self.bytes = np.full(size + 2 * GUARD, 0xFB, np.uint8)  # what nothing wrote is a NaN in any type
        self.owner = np.zeros(len(self.bytes), np.int16)  # 0: nobody's
        self.writable = np.zeros(len(self.bytes), bool)
        self.names = ["no buffer"]
        self.spans = {}
        self.end = GUARD
        self._typed = {width: self.bytes.view(f"u{width}") for width in (1, 2, 4, 8)}

    def place(self, name: str, content: np.ndarray | int, writable: bool = True) -> int:
        """A buffer of these bytes, or of this many unwritten ones -> its address"""
        size = content if isinstance(content, int) else content.nbytes
        start = self.end
        self.end = -(-(start + size) // GUARD) * GUARD + GUARD
        if self.end > len(self.bytes):
            raise Fault(f"{name} of {size} bytes does not fit the memory of {len(self.bytes)}")
        if not isinstance(content, int):
            self.bytes[start : start + size] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        self.owner[start : start + size] = len(self.names)
        self.writable[start : start + size] = writable
        self.names.append(name)
        self.spans[name] = (start, size)
        return self.base + start

    def content(self, name: str) -> np.ndarray:
        """(bytes,) uint8, a copy"""
        start, size = self.spans[name]
        return self.bytes[start : start + size].copy()

    def places(self, addresses: np.ndarray, size: int, writing: bool) -> np.ndarray:
        """Addresses of `size` bytes -> positions in `bytes`. Raises: Fault."""
        at = addresses.astype(np.int64) - self.base
        inside = (at >= 0) & (at <= len(self.bytes) - size)
        clipped = np.where(inside, at, 0)
        owner = self.owner[clipped]
        inside &= (owner > 0) & (owner == self.owner[clipped + (size - 1)])
        if not inside.all():
            raise Fault(f"{size} bytes at {self.describe(int(at[~inside][0]))}")
        if (at % size).any():
            raise Fault(f"{size} bytes at an address that is no multiple: {self.describe(int(at[at % size != 0][0]))}")
        if writing and not self.writable[at].all():
            raise Fault(f"a store into what is only read: {self.describe(int(at[~self.writable[at]][0]))}")
        return at

    def load(self, at: np.ndarray, width: int) -> np.ndarray:
        return self._typed[width][at // width]

    def store(self, at: np.ndarray, width: int, bits: np.ndarray) -> None:
        self._typed[width][at // width] = bits

    def describe(self, at: int) -> str:
        if not self.spans:
            return f"address {at + self.base:#x}, where there is no memory"
        name, (start, size) = min(
            self.spans.items(), key=lambda item: max(item[1][0] - at, at - sum(item[1]), 0)
        )  # the nearest
        return f"byte {at - start} of {name}, which has {size}"
