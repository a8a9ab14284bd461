"""A quantized weight of the units and scales that an algorithm has found, as QuantizedTensor keeps them."""

from __future__ import annotations

import torch

from qcore.algorithms.grids import Grid, columns_of_a_scale
from qcore.bits import pack
from qcore.elements import Float, Int, Level, PerTensor, Tile
from qcore.scheme import Scheme, TensorScheme
from qcore.tensor import TORCH_FLOATS, QuantizedTensor, float_table


def quantized_tensor(
    scheme: Scheme, grid: Grid, units: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, index: torch.Tensor | None = None
) -> QuantizedTensor:  # fmt: skip
    """units: float32 [N, K], qcore/algorithms/grids.py has them. scale, zero: float32 [N, groups]. index: int32 [K], the group of each column."""
    weight = scheme.weight
    size = scale.shape[1]
    zeros = None
    if isinstance(weight.element, Int):
        groups = index if index is not None else _groups(weight, units.shape[1], size)
        held = (units + zero[:, groups]).to(torch.uint8)
        signed, bits = weight.element.signed, weight.element.bits
        codes = pack(held, bits) if bits < 8 else (held ^ 0x80).view(torch.int8) if signed else held
        if weight.zero is not None:
            zeros = (zero - (1 << bits - 1)).to(torch.int8) if signed else zero.to(torch.uint8)
            zeros = _kept(zeros, weight.scales[0])
        half = scale.half()
        scale = half if torch.equal(half.float(), scale) else scale
    else:
        assert isinstance(weight.element, Float)
        codes = _floats(units, weight.element.format)
    scales = _scales(_kept(scale, weight.scales[0]), weight, grid)
    return QuantizedTensor(scheme, tuple(units.shape), codes, scales, zeros, index)


def taken_apart(packed: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """units [N, K], scale and zero [N, groups], and int64 [K], the group of each column: what `quantized_tensor` made it of."""
    weight, (rows, columns) = packed.scheme.weight, packed.shape
    scale = _each_row(packed._scale(), weight.scales[0], rows)
    zero = torch.zeros_like(scale)
    values = packed.values()
    if isinstance(weight.element, Int):
        middle = float(1 << weight.element.bits - 1)
        own = packed.zeros.to(torch.float32) if packed.zeros is not None else torch.zeros(1, 1)
        own = _each_row(own, weight.scales[0], rows).expand(scale.shape)
        zero = own + middle if weight.element.signed else own
        values = values + (middle if weight.element.signed else 0.0)
    groups = packed.index.long() if packed.index is not None else _groups(weight, columns, scale.shape[1])
    return values - zero[:, groups], scale, zero, groups


def _floats(units: torch.Tensor, format: str) -> torch.Tensor:
    if format in TORCH_FLOATS:
        return units.to(TORCH_FLOATS[format])
    table = float_table(format)
    half = len(table) // 2
    codes = torch.bucketize(units.abs(), table[:half]) + half * (units < 0)
    return pack(codes.to(torch.uint8), half.bit_length())


def _scales(scale: torch.Tensor, weight: TensorScheme, grid: Grid) -> tuple[torch.Tensor, ...]:
    kind = weight.scales[0].type
    if kind == "float":
        return (scale,)
    if kind == "e8m0":
        return (scale.to(torch.float8_e8m0fnu).view(torch.uint8),)
    return (scale / grid.scales.whole).to(torch.float8_e4m3fn), torch.full((1, 1), grid.scales.whole)


def _groups(weight: TensorScheme, columns: int, groups: int) -> torch.Tensor:
    """The group of each column."""
    size = columns_of_a_scale(weight.scales[0].granularity, columns)
    return (torch.arange(columns) // size).clamp_(max=groups - 1)


def _kept(part: torch.Tensor, level: Level) -> torch.Tensor:
    """[N, groups] once for rows that share a scale."""
    if isinstance(level.granularity, PerTensor):
        return (
            part[0].clone(memory_format=torch.contiguous_format).view(1, 1)
        )  # a view of one number may have any strides
    return part[:: level.granularity.rows].contiguous() if isinstance(level.granularity, Tile) else part


def _each_row(part: torch.Tensor, level: Level, rows: int) -> torch.Tensor:
    """The inverse of `_kept`."""
    if isinstance(level.granularity, Tile):
        return part.repeat_interleave(level.granularity.rows, 0)[:rows]
    return part.expand(rows, part.shape[1])
