"""ggml's IQ1_S, IQ1_M, IQ2_XXS and IQ2_XS: eight weights at a time are a tuple of a grid, looked up four by four as they are multiplied.

A tuple is a word of 16 bits: its place in the grid, and above it the signs of its eight weights (IQ1's grids have theirs inside). The
word's weights go into eight products, each of every eighth column, so that nothing is reordered but x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from qcore.blocks.dequantize import block_parts
from qcore.blocks.grids import grid, shifted_grid
from qcore.blocks.types import BLOCK_TYPES
from qcore.blocks.unpack import field, neighbours
from qcore.kernels.stacking import StackableLinear
from qcore.kernels.triton.blocks import block_type, whole
from qcore.kernels.triton.launch import _dense_product, programs, routed
from qcore.kernels.triton.linear import ROWS
from qcore.kernels.triton.routing import place_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_KINDS = {"iq2_xxs": (8, 32), "iq2_xs": (9, 16), "iq1_s": (12, 32), "iq1_m": (12, 16)}
"""Bits of a word that are a place in the grid, and weights under one scale."""
_TURN = 128
"""Columns of one turn of the loop."""


@triton.jit  # type: ignore[untyped-decorator]
def weight_of(entries, minus, column, INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32, before they are scaled: of tuples' weights the one of this number, 0 to 7. entries: int32, the tuple's half that it is in. minus: the eight signs, where
    the grid has none."""
    value = (((entries >> (8 * (column % 4))) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    if INDEX < 12:
        flip = (minus << (31 - column)) & -(1 << 31)
        value = (value.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def tuples_of(words_ptr, scales_ptr, row, word, K, INDEX: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of rows [BN] the words of these numbers: their places in the grid, their signs, and float32 scales."""
    words = tl.load(words_ptr + row[:, None] * (K // 8) + word[None, :]).to(tl.int32) & 0xFFFF
    scale = tl.load(scales_ptr + row[:, None] * (K // GROUP) + (word * 8 // GROUP)[None, :]).to(tl.float32) * 0.125
    minus = words >> INDEX
    if INDEX == 9:
        odd = minus ^ (minus >> 4)
        odd = odd ^ (odd >> 2)
        minus = minus | (((odd ^ (odd >> 1)) & 1) << 7)
    return words & ((1 << INDEX) - 1), minus, scale


@triton.jit(do_not_specialize=("M", "shares"))  # type: ignore[untyped-decorator]
def multiply_tuples(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, scales_ptr, coarse_ptr, grid_ptr, blocks_ptr, out_ptr, M, N, K, start, x_stride, shares,
    INDEX: tl.constexpr, GROUP: tl.constexpr, DENSE: tl.constexpr, ROUTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [shares, M, N] of x [M, K]; where DENSE, out [.., K] is the weight itself from row `start` on, and x is not looked at. Where ROUTED,
    parts but the grid are stacked, and blocks says which rows of x meet which (qcore.kernels.triton.routing).

    words: int16 [N, K / 8]. scales: uint8 [N, K / GROUP], in eighths. coarse: float16 [N, K / 256]. grid: int32 [entries, 2], four weights each, 128 added to
    them. The seven signs above a place of nine bits make an even number of minus signs with the eighth."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    begin, end, expert, across = place_of(blocks_ptr, M, tl.cdiv(N, BN), BM, ROUTED)
    if ROUTED:
        if begin >= end:
            return
        words_ptr += expert * N * (K // 8)
        scales_ptr += expert * N * (K // GROUP)
        coarse_ptr += expert * N * (K // 256)
    m = begin + tl.arange(0, BM)
    n = start + across * BN + tl.arange(0, BN)
    share = tl.program_id(1)
    word, eight = tl.arange(0, 16), tl.arange(0, 8)
    row = tl.minimum(n, N - 1).to(tl.int64)
    given = x_ptr + m[:, None].to(tl.int64) * x_stride
    turns = K // 128
    each = tl.cdiv(turns, shares)
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for turn in range(share * each, tl.minimum(turns, share * each + each)):
        coarse = tl.load(coarse_ptr + row * (K // 256) + turn // 2).to(tl.float32)
        if DENSE:  # eight columns of a word side by side, so that a thread writes them at once; four words, for which it has the registers
            for first in range(turn * 16, turn * 16 + 16, 4):
                place, minus, scale = tuples_of(words_ptr, scales_ptr, row, first + tl.arange(0, 4), K, INDEX, GROUP)
                entries = tl.load(grid_ptr + place[:, :, None] * 2 + (eight // 4)[None, None, :])
                value = weight_of(entries, minus[:, :, None], eight[None, None, :], INDEX)
                values = tl.reshape((value * scale[:, :, None] * coarse[:, None, None]).to(dtype), (BN, 32))
                dense = out_ptr + (n - start)[:, None].to(tl.int64) * K + (first * 8 + tl.arange(0, 32))[None, :]
                tl.store(dense, values, mask=(n < N)[:, None])
        else:
            place, minus, scale = tuples_of(words_ptr, scales_ptr, row, turn * 16 + word, K, INDEX, GROUP)
            products = tl.zeros((BN, BM), dtype=tl.float32)
            for half in tl.static_range(2):
                entries = tl.load(grid_ptr + place * 2 + half)
                for byte in tl.static_range(4):
                    value = weight_of(entries, minus, 4 * half + byte, INDEX)
                    column = turn * 128 + word * 8 + 4 * half + byte
                    x = tl.load(given + column[None, :], mask=(m < end)[:, None], other=0.0)
                    products = tl.dot((value * scale).to(dtype), tl.trans(x), products, input_precision="ieee")
            total += products * coarse[:, None]
    if not DENSE:
        out = out_ptr + (share * M + m[None, :]).to(tl.int64) * N + n[:, None]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[None, :] < end) & (n[:, None] < N))


@torch.library.custom_op("qcore::triton_tuples", mutates_args=())
def tuple_product(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, coarse: torch.Tensor, table: torch.Tensor, index: int,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[M, N] in x's dtype; x [M, K] has unit stride along K. Parts as multiply_tuples takes them. experts: as qcore::triton_product."""
    group, outputs = 8 * words.shape[-1] // scales.shape[-1], words.shape[-2]

    def launch(
        grid: tuple[int, int], x: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor, rows: int, start: int, constants: dict[str, Any]
    ) -> None:  # fmt: skip
        multiply_tuples[grid](
            x, words, scales, coarse, table, blocks, out, rows, outputs, x.shape[1], start, x.stride(0), grid[1], INDEX=index, GROUP=group, **constants
        )  # fmt: skip

    if experts is not None:
        return routed(x, experts, len(words), outputs, _TURN, launch)
    # Dense however few rows there are: looking tuples up takes the longest (4096 x 4096 on an H200: 24 us to make it dense, 45 to multiply it with one row).
    return _dense_product(x, outputs, _TURN, launch) if len(x) else x.new_empty(0, outputs)


@tuple_product.register_fake
def _(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, coarse: torch.Tensor, table: torch.Tensor, index: int,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], words.shape[-2])


class GridLinear(StackableLinear):
    """Parts as multiply_tuples takes them: 1.11 to 1.48 times the memory of the blocks."""

    COMMON = ("table",)

    words: torch.Tensor
    scales: torch.Tensor
    coarse: torch.Tensor
    table: torch.Tensor

    def __init__(
        self, words: torch.Tensor, scales: torch.Tensor, coarse: torch.Tensor, table: torch.Tensor, index: int
    ) -> None:
        super().__init__()
        self.index = index
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("coarse", coarse)
        self.register_buffer("table", table)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        kind, rows = block_type(layer.weight.scheme), layer.weight.shape[0]
        blocks = layer.weight.codes.reshape(-1, BLOCK_TYPES[kind].nbytes)
        words, scales, coarse = (
            torch.cat(parts).view(rows, -1)
            for parts in zip(*(_taken_apart(kind, some) for some in blocks.split(16 * ROWS)), strict=True)
        )
        table = shifted_grid(blocks.device) if kind.startswith("iq1") else grid(kind, blocks.device)
        biased = table.view(torch.uint8).view(-1, 8) ^ 128
        return cls(words, scales, coarse, biased.view(torch.int32), _KINDS[kind][0])

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        index, group = _KINDS[block_type(scheme)]
        parts = {
            "words_ptr": torch.int16,
            "scales_ptr": torch.uint8,
            "coarse_ptr": torch.float16,
            "grid_ptr": torch.int32,
        }
        every = programs(
            str(scheme), multiply_tuples, parts, (), {"INDEX": index, "GROUP": group}, dtype, target, slow=True
        )
        return [one for one in every if one.constants.get("DENSE", True) or one.constants["ROUTED"]]

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        out: torch.Tensor = tuple_product(flat, self.words, self.scales, self.coarse, self.table, self.index, experts)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _taken_apart(kind: str, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words [B, 32], scales in eighths [B, groups], float16 [B, 1]. Layouts: qcore/blocks/iq.py."""
    if kind == "iq2_xs":
        words = field(blocks, torch.int16, 2, 32)
    elif kind == "iq2_xxs":
        fields = field(blocks, torch.int32, 2, 16)[:, 1::2]
        codes = torch.stack([fields >> shift & 127 for shift in (0, 7, 14, 21)], 2).flatten(1)
        eighth = sum(codes >> place & 1 for place in range(7)) & 1
        words = blocks[:, 2:66].view(-1, 8, 2, 4)[:, :, 0].flatten(1).int() | codes << 8 | eighth << 15
    elif kind == "iq1_s":
        fields = field(blocks, torch.int16, 34, 8).int()
        high = torch.stack([fields >> shift & 7 for shift in (0, 3, 6, 9)], 2) | (fields >> 12 & 8).unsqueeze(2)
        words = blocks[:, 2:34].int() | high.flatten(1) << 8
    else:
        words = blocks[:, :32].int() | neighbours(blocks[:, 32:48], 4).int() << 8
    if kind == "iq1_m":
        digits = field(blocks, torch.int16, 48, 4).int() >> 12 & 15
        coarse = (
            (digits << torch.tensor([0, 4, 8, 12], device=blocks.device))
            .sum(1, keepdim=True)
            .to(torch.int16)
            .view(torch.float16)
        )
    else:
        coarse = field(blocks, torch.float16, 0)
    return words.to(torch.int16), whole(block_parts(kind, blocks).scale, coarse.float() / 8).to(torch.uint8), coarse
