"""QuantizedTensor: one weight in the canonical layout that every format decodes to and every kernel starts from.

`dequantize()` is the definition of a scheme: stored scales are widened to float32 first, then, in this order,

    Int         w = (q - z) * s            with a float zero point: w = q * s + z
    Float       w = q * s
    Codebook    w = table[q] * s           nested scales: s = scale_table[q_s] * s2 + offset
    levels      s = s0 * s1; a scale that divides in its file is kept as 1 / s1 in float64, and s is rounded once. Coarse
                scales first, w = (q * s1) * s0, where the tool multiplies so (AutoRound's NVFP4)
    float64     a single level that is no float32 number: the product is rounded once (LLM.int8's absmax / 127)
    Block       ggml's definition of the block type
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from qcore.bits import packed_bytes, unpack
from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block, FlatGroup, Float, Granularity, Group, Int, Level, PerTensor, Tile, scale_shape
from qcore.scheme import Scheme, TensorScheme

TORCH_FLOATS: dict[str, torch.dtype] = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
"""Float formats that torch has; the others are decoded by table."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight [N, K] = [out_features, in_features], or stacked experts [E, N, K] (E leads every part below).

    codes     Int and Codebook: a bit stream along K (qcore.bits), uint8 [N, ceil(K * bits / 8)]; signed codes below 8
              bits are held as q + 2^(bits-1), signed 8-bit ones as int8 [N, K]. Float: torch's dtype [N, K], or the bit
              stream where torch has none. Block: uint8 [N, blocks * bytes per block], as in the file.
    scales    one tensor for each level, in the dtype of the file, or float64 where no float32 number is meant: Group [N, ceil(K / n)], PerChannel [N, 1],
              PerTensor [1, 1], Tile [ceil(N / rows), ceil(K / cols)], FlatGroup [1, ceil(N K / n)]; e8m0 as uint8.
    zeros     like scales[0]: uint8 or int8 codes for a stored zero point, else float.
    index     int32 [K], the group of each column, when the scheme is ordered.
    table     float32 [2^bits], a codebook's values. scale_table, offset: the same for nested scales.
    first_row the row of the whole weight that row 0 is (FlatGroup counts elements from there).
    coarse_first  codes are multiplied by the second level of scales (PerTensor) before the first: another last bit.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    codes: torch.Tensor
    scales: tuple[torch.Tensor, ...] = ()
    zeros: torch.Tensor | None = None
    index: torch.Tensor | None = None
    table: torch.Tensor | None = None
    scale_table: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    first_row: int = 0
    coarse_first: bool = False

    def __post_init__(self) -> None:
        rows, columns = self.shape[-2:]
        expected = (*self.shape[:-2], rows, code_bytes(self.scheme.weight, columns))
        if tuple(self.codes.shape) != expected:
            raise ValueError(f"codes of {self.scheme} are {list(expected)}, not {list(self.codes.shape)}")
        if len(self.scales) != len(self.scheme.weight.scales):
            raise ValueError(f"{self.scheme} has {len(self.scheme.weight.scales)} levels of scales")
        for level, scale in zip(self.scheme.weight.scales, self.scales, strict=True):
            wanted = (*self.shape[:-2], *scale_shape(level.granularity, self.first_row + rows, columns))
            if isinstance(level.granularity, FlatGroup):  # rows of a larger weight keep all its scales
                fits = scale.dim() == len(wanted) and scale.shape[-1] >= wanted[-1]
            else:
                wanted = (*self.shape[:-2], *scale_shape(level.granularity, rows, columns))
                fits = tuple(scale.shape) == wanted
            if not fits:
                raise ValueError(f"scales of {self.scheme} are {list(wanted)}, not {list(scale.shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes that the parts hold in memory."""
        parts = (self.codes, *self.scales, self.zeros, self.index, self.table, self.scale_table, self.offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows start..stop of a weight [N, K], sharing memory. A Tile boundary must lie at `start`."""
        levels = self.scheme.weight.scales
        count = min(stop, self.shape[-2]) - start
        cut = [
            _cut(level.granularity, scale, start, start + count)
            for level, scale in zip(levels, self.scales, strict=True)
        ]
        zeros = None if self.zeros is None else _cut(levels[0].granularity, self.zeros, start, start + count)
        return replace(
            self,
            shape=(count, self.shape[-1]),
            codes=self.codes[start : start + count],
            scales=tuple(cut),
            zeros=zeros,
            first_row=self.first_row + start,
        )

    def take(self, rows: torch.Tensor) -> QuantizedTensor:
        """The rows that an integer vector names, as a weight [len(rows), K]."""
        levels = list(self.scheme.weight.scales)
        scales, zeros = list(self.scales), self.zeros
        for i, level in enumerate(levels):
            grid = level.granularity
            if isinstance(grid, FlatGroup):
                raise ValueError("rows of flat groups cannot be taken apart")
            if isinstance(grid, Tile):  # one row of a tile is a row of groups
                levels[i] = replace(level, granularity=Group(grid.cols))
            if not isinstance(grid, PerTensor):
                places = rows // grid.rows if isinstance(grid, Tile) else rows
                scales[i] = scales[i][places]
                zeros = zeros[places] if zeros is not None and i == 0 else zeros
        scheme = replace(self.scheme, weight=replace(self.scheme.weight, scales=tuple(levels)))
        shape = (rows.numel(), self.shape[-1])
        return replace(self, scheme=scheme, shape=shape, codes=self.codes[rows], scales=tuple(scales), zeros=zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight the codes stand for, computed in float32 and rounded to `dtype` once; in `self.shape`."""
        scheme = self.scheme.weight
        if isinstance(scheme.element, Block):
            rows = self.codes.reshape(-1, self.codes.shape[-1])
            return dequantize_blocks(scheme.element.type, rows).reshape(self.shape).to(dtype)
        values = self.values()
        if not self.scales:
            return values.to(dtype)
        if self.coarse_first:
            values = values * self.scales[1].to(torch.float32)
        scale = self._scale()
        if self.zeros is None:
            return self._apply(values, scale).to(dtype)
        zero = self.zeros.to(torch.float32)
        if scheme.zero == "float":
            return self._apply(values, scale, after=zero).to(dtype)
        return self._apply(values, scale, before=zero).to(dtype)

    def values(self) -> torch.Tensor:
        """float32 values of the codes before zero points and scales, in `self.shape`."""
        element, columns = self.scheme.weight.element, self.shape[-1]
        if isinstance(element, Int):
            if element.bits == 8:
                return self.codes.to(torch.float32)
            codes = unpack(self.codes, element.bits, columns).to(torch.float32)
            return codes - (1 << (element.bits - 1)) if element.signed else codes
        if isinstance(element, Float) and element.format in TORCH_FLOATS:
            return self.codes.to(torch.float32)
        codes = unpack(self.codes, element.bits, columns)
        table = float_table(element.format) if isinstance(element, Float) else self.table
        assert table is not None, "a codebook travels with its tensor"
        return table.to(codes.device)[codes.int()]

    def _scale(self) -> torch.Tensor:
        """float32 product of the levels, in the shape of the finest one."""
        levels = self.scheme.weight.scales
        scale = _widen(self.scales[0], levels[0], self.scale_table)
        if self.coarse_first:
            return scale
        for level, coarse in zip(levels[1:], self.scales[1:], strict=True):
            other = coarse if coarse.dtype == torch.float64 else coarse.to(torch.float32)
            if isinstance(level.granularity, FlatGroup):  # counts weight elements; here they are finest-level scales
                other = other.repeat_interleave(level.granularity.size // _size(levels[0].granularity), -1)
                other = other[..., : scale.numel()].reshape(scale.shape)
            scale = (scale * other).to(torch.float32)
        return scale if self.offset is None else scale + self.offset

    def _apply(
        self,
        values: torch.Tensor,
        scale: torch.Tensor,
        before: torch.Tensor | None = None,
        after: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(values - before) * scale + after, each spread over the elements that it belongs to."""
        granularity = self.scheme.weight.scales[0].granularity
        columns = self.shape[-1]
        if isinstance(granularity, Group) and self.index is None and columns % granularity.size == 0:
            # Broadcasting over groups spares the memory of spread scales.
            values = values.unflatten(-1, (-1, granularity.size))
            scale, before, after = (None if t is None else t.unsqueeze(-1) for t in (scale, before, after))  # type: ignore[assignment]
        else:
            scale, before, after = (None if t is None else self._spread(t) for t in (scale, before, after))  # type: ignore[assignment]
        values = ((values if before is None else values - before) * scale).to(torch.float32)
        return (values if after is None else values + after).reshape(self.shape)

    def _spread(self, part: torch.Tensor) -> torch.Tensor:
        # A file may state groups that are far larger than the weight: never more is spread than there is.
        granularity = self.scheme.weight.scales[0].granularity
        rows, columns = self.shape[-2:]
        if isinstance(granularity, Group):
            if self.index is not None:
                return part.index_select(-1, self.index)
            return part.repeat_interleave(min(granularity.size, columns), -1)[..., :columns]
        if isinstance(granularity, Tile):
            tall = part.repeat_interleave(min(granularity.rows, rows), -2)[..., :rows, :]
            return tall.repeat_interleave(min(granularity.cols, columns), -1)[..., :columns]
        if isinstance(granularity, FlatGroup):
            first = self.first_row * columns
            element = torch.arange(first, first + rows * columns, device=part.device)
            return part.flatten(-2)[..., element // granularity.size].reshape(self.shape)
        return part


def code_bytes(scheme: TensorScheme, columns: int) -> int:
    """Last dimension of the codes of a weight with `columns` input features (bytes, or elements of torch's floats)."""
    element = scheme.element
    if isinstance(element, Block):
        block = BLOCK_TYPES[element.type]
        return columns // block.elements * block.nbytes
    if isinstance(element, Float) and element.format in TORCH_FLOATS:
        return columns
    return packed_bytes(columns, element.bits)


@cache
def float_table(name: str) -> torch.Tensor:
    """float32 value of every code of a float format that torch lacks (OCP Microscaling Formats v1.0, section 5.3)."""
    exponent_bits, mantissa_bits = int(name[1]), int(name[3])
    bias = (1 << (exponent_bits - 1)) - 1
    magnitudes = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits) + (1 if exponent else 0)
        magnitudes.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return torch.tensor(magnitudes + [-value for value in magnitudes], dtype=torch.float32)


def _widen(scale: torch.Tensor, level: Level, table: torch.Tensor | None) -> torch.Tensor:
    if level.type == "e8m0":
        return scale.view(torch.float8_e8m0fnu).to(torch.float32)
    if level.type == "dynamic8":
        assert table is not None, "a nested codebook travels with its tensor"
        return table[scale.int()]
    return scale if scale.dtype == torch.float64 else scale.to(torch.float32)


def _size(granularity: Granularity) -> int:
    assert isinstance(granularity, Group | FlatGroup), "nested scales are grouped"
    return granularity.size


def _cut(granularity: Granularity, part: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if isinstance(granularity, PerTensor | FlatGroup):
        return part
    if isinstance(granularity, Tile):
        if start % granularity.rows:
            raise ValueError(f"rows are cut at multiples of {granularity.rows}")
        return part[start // granularity.rows : -(-stop // granularity.rows)]
    return part[start:stop]


Order = Literal["dequantized", "reciprocal", "integers", "inverses"]
"""How a tool multiplies quantized inputs. The numbers are the same but for a last bit, which decides how the next layer rounds its
input; so the reference keeps to it. dequantized: inputs are divided by their scale and rounded, and both sides dequantized.
reciprocal: inputs are multiplied by 1 / scale instead. integers: the same, and codes are multiplied before they are scaled.
inverses: codes are multiplied by the inverse of what inputs are multiplied by (qcore/kernels/inverses.py)."""


@dataclass(frozen=True)
class LayerTensors:
    """All that a checkpoint holds of one linear layer or embedding.

    input_scale, input_zero: of statically quantized activations, [1] float and [1] int8; input_scale is also the scale of
    the whole tensor above NVFP4's run-time ones. input_multiplier: [K], a vector
    that multiplies the input first (SmoothQuant, AWQ scales that were not folded away). order: of the tool's float operations.
    """

    weight: QuantizedTensor
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero: torch.Tensor | None = None
    input_multiplier: torch.Tensor | None = None
    order: Order = "dequantized"
