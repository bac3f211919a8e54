"""How many columns a program takes at a time, and with how many warps: a table instead of an autotuner, so no first call takes minutes.

One program has one row of V columns, in blocks of eight columns a thread: two 16-byte loads in flight each, and the 16-bit gradient of
them is one 16-byte store. With that the plain kernels need 40 registers at most, so three blocks of 16 warps fit a multiprocessor and one
loads while another computes; with 16 columns a thread some spilled (`python -m l3m_kernels.triton_ops`). One table is for all dtypes: what
is read is fp32 for each. None has been measured against its neighbours yet.
"""

from typing import NamedTuple


class Config(NamedTuple):
    block: int  # columns
    warps: int
    registers: int | None = None  # a thread's, at most; None: the assembler's choice


class Tiles(NamedTuple):
    block: int  # rows and columns of a tile of a product
    depth: int  # of both operands, at a time
    warps: int


# Largest V it is for, and the configuration; the last one is for everything larger.
ROWS: tuple[tuple[int | None, Config], ...] = (
    (256, Config(256, 1)),
    (1024, Config(1024, 4)),
    (None, Config(4096, 16)),
)
# Instead of that last one where gradients are fp32: with it sm_120's assembler spills 4 bytes, so that a third block fits.
WIDE = Config(2048, 8)
SEQUENCES = Config(1024, 4)  # tokens of a sequence at a time
ELEMENTS = Config(4096, 8)  # of a gradient that is scaled: two 16-byte loads a thread where it has 16 bits
# Responses at a time, in `barrier_weights`. It is one block, and registers are there for it: left to choose, the assembler takes 48 to 64
# and spills up to 32 bytes of some variants, so that a second block would fit beside it.
RESPONSES = Config(128, 4, registers=128)
# With the filter of level and trend, which keeps three models of 6 doubles in registers: at 128 it spills 100 to 190 bytes.
FILTERED = Config(128, 4, registers=255)

PRODUCT = Tiles(64, 16, 4)  # 32 sums a thread; of twice the depth, sm_90's assembler spills 12 bytes


def for_rows(vocabulary: int, wide: bool = False) -> Config:
    """The configuration for rows of V columns; `wide`: whose gradient is fp32."""
    found = next(config for largest, config in ROWS if largest is None or vocabulary <= largest)
    return WIDE if wide and found.block > WIDE.block else found
