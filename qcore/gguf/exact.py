"""Block types that hold a quantized weight without changing one of its numbers.

A scale that spans several blocks is repeated in each. Of the types that could, the smallest is taken whose blocks, when
they are dequantized, are equal to the weight: nothing here has to be believed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.pack import planes
from qcore.blocks.quantize_simple import pack_4, pack_5, pack_8
from qcore.elements import Block, FlatGroup, Float, Group, Int, Level, PerChannel, PerTensor, Tile

if TYPE_CHECKING:
    from qcore.tensor import QuantizedTensor

_RUN = 32
"""Weights that share a scale in all of these types but nvfp4."""


def exact_blocks(weight: QuantizedTensor, among: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The types (of `among`, where given) that hold the weight [N, K], the smallest first, with its blocks, uint8 [N, bytes
    per row]."""
    if isinstance(element := weight.scheme.weight.element, Block):
        if among is None or element.type in among:
            yield element.type, weight.codes
        return
    expected = weight.dequantize()
    for name, blocks in _candidates(weight):
        rows = blocks.view(weight.shape[0], -1)
        if (among is None or name in among) and torch.equal(dequantize_blocks(name, rows), expected):
            yield name, rows


def _candidates(weight: QuantizedTensor) -> Iterator[tuple[str, torch.Tensor]]:
    scheme = weight.scheme.weight
    if len(weight.shape) != 2 or weight.shape[1] % _RUN or weight.offset is not None:
        return
    if isinstance(scheme.element, Int) and len(scheme.scales) == 1:
        yield from _integers(weight)
    elif scheme.element == Float("e2m1"):
        if scheme.scales == (Level(Group(32), "e8m0"),):
            yield "mxfp4", torch.cat([weight.scales[0].reshape(-1, 1), _nibbles(weight, 32)], 1)
        if len(scheme.scales) == 2 and scheme.scales[0] == Level(Group(16), "e4m3fn") and weight.shape[1] % 64 == 0:
            scales = weight.scales[0].float() * weight.scales[1].float()  # ggml's block has no second level
            codes = _nibbles(weight, 16).view(-1, 32)
            yield "nvfp4", torch.cat([scales.to(torch.float8_e4m3fn).view(torch.uint8).view(-1, 4), codes], 1)


def _integers(weight: QuantizedTensor) -> Iterator[tuple[str, torch.Tensor]]:
    """From the smallest type to the largest: with a minimum as the scheme has it, or else with none."""
    scale, zero = _by_run(weight, weight.scales[0]), _by_run(weight, weight.zeros)
    if scale is None or (zero is None and weight.zeros is not None):
        return
    scale = scale.reshape(-1, 1)
    codes = weight.values().view(-1, _RUN)
    low = codes.amin()
    if zero is None:
        codes, minimum = codes - low, low * scale
        signed = codes + low
    elif weight.scheme.weight.zero == "float":
        minimum, signed = zero.reshape(-1, 1), None
    else:
        minimum, signed = -zero.reshape(-1, 1) * scale, codes - zero.reshape(-1, 1)
    if signed is not None and _within(signed, -8, 7):
        yield "q4_0", pack_4(signed + 8, scale)
    if _within(codes, 0, 15):
        yield "q4_1", pack_4(codes, scale, minimum)
    if signed is not None and _within(signed, -16, 15):
        yield "q5_0", pack_5(signed + 16, scale)
    if _within(codes, 0, 31):
        yield "q5_1", pack_5(codes, scale, minimum)
    if signed is not None and _within(signed, -128, 127):
        yield "q8_0", pack_8(signed, scale)


def _by_run(weight: QuantizedTensor, part: torch.Tensor | None) -> torch.Tensor | None:
    """A scale or zero point for each run of a row, float32 [N, K / 32]; None where runs do not have one each."""
    if part is None:
        return None
    (rows, columns), part = weight.shape, part.float()
    granularity = weight.scheme.weight.scales[0].granularity
    if weight.index is not None:
        groups = weight.index.view(-1, _RUN).long()
        return part[:, groups[:, 0]] if bool((groups == groups[:, :1]).all()) else None
    if isinstance(granularity, PerTensor | PerChannel):
        return part.expand(rows, columns // _RUN)
    if isinstance(granularity, FlatGroup):
        if granularity.size % _RUN:
            return None
        return part.flatten().repeat_interleave(granularity.size // _RUN)[: rows * columns // _RUN].view(rows, -1)
    size = granularity.size if isinstance(granularity, Group) else getattr(granularity, "cols", 0)
    if not size or size % _RUN:
        return None
    if isinstance(granularity, Tile):
        part = part.repeat_interleave(granularity.rows, 0)[:rows]
    return part.repeat_interleave(size // _RUN, 1)[:, : columns // _RUN]


def _nibbles(weight: QuantizedTensor, run: int) -> torch.Tensor:
    """The codes of runs, the first half of each in the low nibbles: uint8 [runs, run / 2]."""
    low, high = weight.codes & 15, weight.codes >> 4
    return planes(torch.stack([low, high], -1).view(-1, 2, run // 2), 4)


def _within(values: torch.Tensor, low: int, high: int) -> bool:
    least, most = values.aminmax()
    return bool(least >= low) and bool(most <= high)
