"""Products of a mixture's experts (grouped GEMMs): each row of x meets the weight of one of several experts, all in one launch.

Rows come in the order of their experts. A program has rows of one expert, which a table on the device tells it; the table is as long as it can
get, so that the host need not know how many rows an expert has: of what is behind the last block, programs return at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from qcore.kernels.triton.program import Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcore.kernels.triton.tilings import Tiling

_PLACES = 16
"""Of the table, that a program fills."""


@triton.jit  # type: ignore[untyped-decorator]
def place_of(blocks_ptr, M, across, BM: tl.constexpr, ROUTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows of x: the first, the one behind the last, and their expert; and its place along the weight's rows. across: programs along
    these. blocks: int32 [.., 3], as lay_out makes it, where ROUTED; else rows of x follow each other in blocks of BM."""
    if ROUTED:
        blocks = tl.num_programs(0) // across
        block = blocks_ptr + tl.program_id(0) % blocks * 3
        begin, end, expert = tl.load(block), tl.load(block + 1), tl.load(block + 2).to(tl.int64)
    else:
        blocks = tl.cdiv(M, BM)
        begin, end, expert = tl.program_id(0) % blocks * BM, M, 0
    return begin, end, expert, tl.program_id(0) // blocks


@triton.jit
def rows_below(experts_ptr, expert, M, steps):  # type: ignore[no-untyped-def]
    """int32: how many of ascending experts [M] are below these. steps: bits of M."""
    low = tl.zeros_like(expert)
    high = low + M
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(experts_ptr + middle, mask=middle < high, other=1 << 30) < expert
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=("M", "count", "steps"))  # type: ignore[untyped-decorator]
def lay_out(experts_ptr, blocks_ptr, M, count, steps, BM: tl.constexpr, EXPERTS: tl.constexpr, PLACES: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """blocks: int32 [count, 3], of each block of up to BM rows the first, the one behind the last, and their expert; zeros where there are no more.
    experts: int32 [M], ascending, below EXPERTS."""
    expert = tl.arange(0, EXPERTS)
    begin = rows_below(experts_ptr, expert, M, steps)
    end = rows_below(experts_ptr, expert + 1, M, steps)
    own = tl.cdiv(end - begin, BM)
    behind = tl.cumsum(own, 0)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = place[:, None] - (behind - own)[None, :]
    found = (inside >= 0) & (place[:, None] < behind[None, :])
    first = begin[None, :] + inside * BM
    block = blocks_ptr + place * 3
    tl.store(block, tl.sum(tl.where(found, first, 0), 1), mask=place < count)
    tl.store(block + 1, tl.sum(tl.where(found, tl.minimum(first + BM, end[None, :]), 0), 1), mask=place < count)
    tl.store(block + 2, tl.sum(tl.where(found, expert[None, :], 0), 1), mask=place < count)


def blocks_of(experts: torch.Tensor, count: int, block: int) -> torch.Tensor:
    """int32 [most blocks, 3], as lay_out has it, of int32 experts [M] below `count`. block: rows of one; where it is 1, the experts themselves."""
    if block == 1:
        return experts
    rows = len(experts)
    most = min(rows, count) + rows // block
    blocks = experts.new_empty(most, 3)
    constants = _constants(block, count)
    lay_out[(triton.cdiv(most, _PLACES),)](experts, blocks, rows, most, rows.bit_length(), **constants)
    return blocks


def routed_tilings(tilings: Sequence[Tiling], vector: bool) -> list[Tiling]:
    """Those for experts, of tilings from the one for the fewest rows on: for a row each, where there is a kernel for one row; for few, and for many."""
    blocks = [tiling for tiling in tilings if tiling.rows > 1]
    rows = [tiling for tiling in tilings if tiling.rows == 1 and vector]
    return [*rows, *dict.fromkeys((blocks[0], blocks[-1]))]


def routed_tiling(tilings: Sequence[Tiling], rows: int, count: int) -> Tiling:
    """Of `routed_tilings`, the one for so many rows of so many experts."""
    block = routed_block([tiling.rows for tiling in tilings], rows, count)
    return next(tiling for tiling in tilings if tiling.rows == block)


def routed_block(blocks: Sequence[int], rows: int, count: int) -> int:
    """Rows of a block, of those that there are, from the fewest on: where they are 1, for each row a program of its own. That reads some weights twice, of half
    as many rows as there are experts about one in five. How many rows an expert has is not known here, but on average."""
    if blocks[0] == 1:
        if 2 * rows <= count:
            return 1
        blocks = blocks[1:]
    return blocks[0] if rows <= blocks[0] * count else blocks[-1]


def routing_programs(blocks: Sequence[int]) -> list[Program]:
    """What makes the tables of blocks of so many rows; of 128 experts, for others differ in little."""
    signature = {"experts_ptr": "*i32", "blocks_ptr": "*i32", **dict.fromkeys(("M", "count", "steps"), "i32")}
    return [
        Program(f"blocks of {block} rows", lay_out, signature, _constants(block, 128), frozenset({"experts_ptr", "blocks_ptr"}))
        for block in blocks
        if block > 1
    ]  # fmt: skip


def _constants(block: int, count: int) -> dict[str, int]:
    return {"BM": block, "EXPERTS": triton.next_power_of_2(count), "PLACES": _PLACES}
