"""ggml's IQ1_S, IQ1_M, IQ2_XXS and IQ2_XS: eight weights at a time are a tuple of a grid, looked up in vector memory. A word of 16 bits is its place, and above it
signs; in blocks of K the low bytes of all words come first. x is reordered, for the first weights of all tuples are multiplied first, then the second ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import block_parts
from qcore.blocks.grids import grid
from qcore.blocks.types import BLOCK_TYPES
from qcore.blocks.unpack import field, half
from qcore_tpu.kernels.blocks import kind_of
from qcore_tpu.kernels.form import Form, block_of
from qcore_tpu.kernels.linear import ROWS, PlanesLinear, grouped
from qcore_tpu.kernels.program import COLUMNS, ProductProgram, programs_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_TUPLES = {"iq2_xxs": (8, 32), "iq2_xs": (9, 16), "iq1_s": (11, 32), "iq1_m": (11, 16)}
"""Bits of a place in the grid, and weights under one scale."""
_COARSE = 256


class GridLinear(PlanesLinear):
    """w = value * (whole scale) * (an eighth of the block's float). Within a block of K, words of different groups follow each other, so that scales lie beside
    them."""

    @classmethod
    def form_of(cls, scheme: Scheme, columns: int) -> Form:
        bits, group = _TUPLES[kind_of(scheme)]
        return Form(2, block_of(columns, 2, _COARSE), group, coarse=_COARSE, tuples=bits)

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[ProductProgram]:
        return programs_of(cls.form_of(scheme, COLUMNS), str(scheme), dtype)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight, (rows, columns) = layer.weight, layer.weight.shape
        kind, form = kind_of(weight.scheme), cls.form_of(weight.scheme, columns)
        entries, places = _grid(kind)
        codes, scales, coarse = [], [], []
        for part in weight.codes.split(ROWS):
            taken = block_parts(kind, part)
            eighth = _float_of(kind, part.reshape(-1, BLOCK_TYPES[kind].nbytes)) / 8
            scales.append(torch.nan_to_num(taken.scale / eighth, 0.0, 0.0, 0.0).round().to(torch.int8))
            coarse.append(eighth)
            words = _words(form.tuples, taken.codes.reshape(len(part), -1, 8).int(), places)
            mixed = words.view(len(part), -1, form.block // form.group, form.group // 8).transpose(2, 3).flatten(2)
            codes.append(torch.cat([mixed & 255, mixed >> 8], 2).flatten(1).to(torch.uint8))
        groups = [torch.cat(parts).reshape(rows, -1).t() for parts in (scales, coarse)]
        return cls(
            form,
            torch.cat(codes).t().contiguous(),
            scales=grouped(groups[0], form, columns).contiguous(),
            coarse=grouped(groups[1], form, columns, _COARSE).contiguous(),
            grid=entries.view(-1, 128),
        )


def _grid(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [entries]: two bits for each of eight weights; and of each such number the place, int32 [65536]."""
    values = grid("iq1_s" if kind.startswith("iq1") else kind, torch.device("cpu")).view(torch.int8).view(-1, 8).int()
    entries = _joined(values + 1 if kind.startswith("iq1") else _sizes(values))
    places = torch.zeros(1 << 16, dtype=torch.int32)
    places[entries] = torch.arange(len(entries), dtype=torch.int32)
    return entries, places


def _words(bits: int, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """int32 [rows, tuples] of values [rows, tuples, 8] as qcore.blocks has them."""
    if bits == 11:  # eight times -1, 0, 1, and 1 or -1
        negative = values[..., 0] & 7 == 7
        return places[_joined((values + negative[..., None].int() * 2 - 1) // 8 + 1)] | negative.int() << bits
    signs = ((values < 0).int() << torch.arange(8, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    return places[_joined(_sizes(values.abs()))] | (signs & (1 << (16 - bits)) - 1) << bits


def _sizes(values: torch.Tensor) -> torch.Tensor:
    """0, 1, 2 of 8, 25, 43."""
    return (values > 8).int() + (values > 25).int()


def _joined(codes: torch.Tensor) -> torch.Tensor:
    """int32: two bits of each of eight, the first lowest."""
    return (codes << torch.arange(0, 16, 2, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _float_of(kind: str, blocks: torch.Tensor) -> torch.Tensor:
    """float32 [blocks, 1]. IQ1_M's has a digit on top of each word of scales (qcore.blocks.iq)."""
    if kind != "iq1_m":
        return half(blocks, 0)
    digits = field(blocks, torch.int16, 48, 4).int() >> 12 & 15
    whole = (digits << torch.arange(0, 16, 4, dtype=torch.int32)).sum(1, keepdim=True)
    return whole.to(torch.int16).view(torch.float16).to(torch.float32)
