"""Two threads that touch one byte, one of them writing, in no order.

What orders two accesses of different threads is a barrier between them (PTX ISA, 8 "Memory Consistency Model": a barrier synchronises, a
shuffle does not; without an order either value may be read). Each thread has a clock, one count per thread: how much of that thread's work
it knows of. Two threads that write the same value race too. Clusters, which nothing orders, are not compared: the row kernels' flag is
written by many.
"""

import numpy as np

from ptx.memory import Memory
from ptx.text import Fault

NOBODY, MANY = -1, -2


class Clocks:
    """Of the threads of a cluster. An access is known to a thread whose clock says at least the count at which it was made."""

    def __init__(self, threads: int):
        self.known = np.zeros((threads, threads), np.int32)
        np.fill_diagonal(self.known, 1)

    def of(self, threads: np.ndarray) -> np.ndarray:
        """Their own counts."""
        return self.known[threads, threads]

    def release(self, threads: np.ndarray) -> np.ndarray:
        """-> what these know together; what they do from here on is not in it."""
        together = self.known[threads].max(0)
        self.known[threads, threads] += 1
        return together

    def acquire(self, threads: np.ndarray, what: np.ndarray) -> None:
        self.known[threads] = np.maximum(self.known[threads], what)

    def meet(self, threads: np.ndarray) -> None:
        """A barrier of these."""
        self.acquire(threads, self.release(threads))


class Races:
    """Who read and wrote each byte of a memory last, of the bytes that can be written."""

    def __init__(self, memory: Memory, clocks: Clocks):
        self.memory, self.clocks = memory, clocks
        shape = len(memory.bytes)
        self.reader, self.writer = np.full(shape, NOBODY, np.int32), np.full(shape, NOBODY, np.int32)
        self.read_at, self.written_at = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.readers: dict[int, np.ndarray] = {}  # byte that MANY read -> at which count each thread did

    def saw(self, at: np.ndarray, size: int, threads: np.ndarray, writing: bool) -> None:
        """An access of `size` bytes by each of these threads. Raises: Fault."""
        if not writing and not self.memory.writable[at].any():
            return
        at = (at[:, None] + np.arange(size)).reshape(-1)
        threads = np.repeat(threads, size)
        writer = self.writer[at]
        known = (writer == NOBODY) | (self.clocks.known[threads, writer] >= self.written_at[at])
        self._must(known, at, threads, writing, "wrote")
        if writing:
            self._write(at, threads)
        else:
            self._read(at, threads)

    def _write(self, at: np.ndarray, threads: np.ndarray) -> None:
        reader = self.reader[at]
        known = (reader < 0) | (self.clocks.known[threads, reader] >= self.read_at[at])
        for index in np.flatnonzero(reader == MANY):
            known[index] = (self.clocks.known[threads[index]] >= self.readers.pop(int(at[index]))).all()
        self._must(known, at, threads, True, "read")
        self.writer[at], self.written_at[at], self.reader[at] = threads, self.clocks.of(threads), NOBODY
        clash = self.writer[at] != threads
        if clash.any():
            raise Fault(f"race: two lanes write at once {self.memory.describe(int(at[clash][0]))}")

    def _read(self, at: np.ndarray, threads: np.ndarray) -> None:
        counts, before = self.clocks.of(threads), self.reader[at]
        alone = (before == NOBODY) | (before == threads)
        alone |= (before >= 0) & (
            self.clocks.known[threads, before] >= self.read_at[at]
        )  # who knows of it stands for it
        first = at[alone]
        self.reader[first], self.read_at[first] = threads[alone], counts[alone]
        shared = ~alone
        shared[alone] = self.reader[first] != threads[alone]  # several lanes of this very load
        for index in np.flatnonzero(shared):
            byte = int(at[index])
            if self.reader[byte] != MANY:
                self.readers[byte] = np.zeros(len(self.clocks.known), np.int32)
                self.readers[byte][self.reader[byte]] = self.read_at[byte]
                self.reader[byte] = MANY
            self.readers[byte][threads[index]] = counts[index]

    def ends(self, start: int, size: int, known: np.ndarray) -> None:
        """The memory of a block that ends, with what its threads know together. Raises: Fault, of an access that they do not know of."""
        for thread, count, did in ((self.reader, self.read_at, "reads"), (self.writer, self.written_at, "writes")):
            here, at = thread[start : start + size], count[start : start + size]
            late = (here >= 0) & (known[here] < at)
            for byte in np.flatnonzero(here == MANY):
                late[byte] = (known < self.readers[start + int(byte)]).any()
            if late.any():
                where = self.memory.describe(start + int(np.flatnonzero(late)[0]))
                raise Fault(f"race: another block {did} {where}, and the block may have ended, with its memory")

    def _must(self, known: np.ndarray, at: np.ndarray, threads: np.ndarray, writing: bool, did: str) -> None:
        if known.all():
            return
        first = int(np.flatnonzero(~known)[0])
        other = int((self.writer if did == "wrote" else self.reader)[at[first]])
        whom = "several threads" if other == MANY else f"thread {other}"
        raise Fault(
            f"race: thread {int(threads[first])} {'writes' if writing else 'reads'} "
            f"{self.memory.describe(int(at[first]))}, which {whom} {did}, and no barrier is between"
        )
