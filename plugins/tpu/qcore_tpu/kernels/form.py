"""How a weight lies in memory for the product on a TPU, as facts alone: neither torch nor jax is imported.

Weights are turned, [K, N], for a TPU's vectors run along N. K is cut into blocks, of which the product takes one at a time, and within a block the bits of a
code stand in planes of 8, 4, 2 and 1 bits, the lowest bits first. A plane of b bits has block * b / 8 rows of bytes: row r has the columns r, r + rows,
r + 2 * rows .. of the block, the first of them in its lowest bits. So a shift and a mask of whole rows give codes in the order of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_ROWS = 32
"""Rows of bytes that a TPU's vector registers hold together: planes are whole multiples."""
LANES = 128
"""Numbers of a TPU's vector: what the length of x is cut at multiples of."""
FEWEST = 16
"""Rows of a block of an expert's, at least: what a bfloat16 vector register holds."""
_LONGEST = 1024
"""Columns of a block, at most, unless a group is longer."""


@dataclass(frozen=True)
class Rounding:
    """How inputs become few bits. element: `int8`, `e4m3fn` or `e2m1`. group: columns of x under one scale; 0: a row's, or all where the scale is stored (not dynamic). scale:
    what scales are rounded to: `float`, `e8m0`, or `e4m3fn` under one that is stored. outliers: columns with a value beyond stay as they are (LLM.int8)."""

    element: str
    dynamic: bool
    group: int = 0
    scale: str = "float"
    outliers: float | None = None

    @property
    def before(self) -> bool:
        """Whether XLA rounds x before the product, which gets what it stands for; else x is rounded within."""
        return self.scale != "float" or self.outliers is not None


@dataclass(frozen=True)
class Form:
    """bits: of a code, which is a whole number above `center` (8-bit signed ones are int8 and have none), or a small float with `exponent` bits of exponent above
    `bias`, or a place in a table. block: columns of a block of K. group: columns under one scale; 0: all, and sums are scaled. coarse: columns under one of the scales
    that multiply these; 0: there are none. zero: empty, `subtracted` from codes, or `added` to what is scaled.
    tuples: bits of a place in a grid of eight weights (qcore_tpu.kernels.grids), two bits for each of them; 0: codes stand for one weight."""

    bits: int
    block: int
    group: int = 0
    center: int = 0
    exponent: int = 0
    bias: int = 0
    table: bool = False
    coarse: int = 0
    zero: str = ""
    rounding: Rounding | None = None
    tuples: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the planes."""
        return widths(self.bits)

    def byte_rows(self, columns: int) -> int:
        """Rows of bytes that so many columns take."""
        return columns * self.bits // 8


def widths(bits: int) -> tuple[int, ...]:
    """Bits of each plane, the one with the lowest bits of a code first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def block_of(columns: int, bits: int, group: int) -> int:
    """Columns of a block for a weight of so many columns: whole groups and whole planes, and the fewest columns to fill up with zeros."""
    unit = math.lcm(_ROWS * 8 // min(widths(bits)), group or 1)
    if columns <= max(_LONGEST, unit):
        return -(-columns // unit) * unit
    unit = math.lcm(unit, LANES)
    units = -(-columns // unit)
    return unit * max((most for most in range(1, max(_LONGEST // unit, 1) + 1) if units % most == 0), default=1)
