"""Layers of random numbers in any scheme, with values of real weights' size."""

from __future__ import annotations

from functools import cache

import torch

from qcore.bits import pack
from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block, Codebook, Float, Group, Int, Level, scale_shape
from qcore.scheme import Scheme, TensorScheme
from qcore.tensor import TORCH_FLOATS, LayerTensors, QuantizedTensor

_POOL = 256
"""Different blocks that a weight in a block type is put together from."""


def random_layer(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> LayerTensors:
    """A layer [rows, columns] on the CPU; the same for the same arguments."""
    random = torch.Generator().manual_seed(seed)
    weight = scheme.weight
    if isinstance(weight.element, Block):
        tensor = QuantizedTensor(scheme, (rows, columns), _blocks(weight.element.type, rows, columns, random))
    else:
        tensor = _scaled(scheme, rows, columns, random)
    if scheme.input is not None and len(scheme.input.scales) == 2:  # what a batch holds is not to change its rows
        return LayerTensors(tensor, input_scale=torch.tensor([6 / (448 * 6)]))
    if scheme.input is None or scheme.input.dynamic:
        return LayerTensors(tensor)
    zero = None if scheme.input.zero is None else torch.tensor([-3], dtype=torch.int8)
    return LayerTensors(tensor, input_scale=torch.tensor([0.03]), input_zero=zero)


def _scaled(scheme: Scheme, rows: int, columns: int, random: torch.Generator) -> QuantizedTensor:
    weight = scheme.weight
    scales = tuple(_scale(level, weight, i, rows, columns, random) for i, level in enumerate(weight.scales))
    nested = any(level.type == "dynamic8" for level in weight.scales)
    return QuantizedTensor(
        scheme, (rows, columns), _codes(weight, rows, columns, random), scales,
        zeros=_zeros(weight, rows, columns, random),
        index=_index(weight, columns, random) if weight.ordered else None,
        table=torch.linspace(-1, 1, 1 << weight.bits) if isinstance(weight.element, Codebook) else None,
        scale_table=torch.linspace(0.1, 1, 256) if nested else None,
        offset=torch.tensor(0.01) if nested else None,
    )  # fmt: skip


def _codes(weight: TensorScheme, rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    element = weight.element
    if isinstance(element, Float) and element.format in TORCH_FLOATS:
        return torch.randn(rows, columns, generator=random).to(TORCH_FLOATS[element.format])
    width = torch.uint8 if element.bits <= 8 else torch.int16
    codes = torch.randint(0, 1 << element.bits, (rows, columns), dtype=width, generator=random)
    if isinstance(element, Int) and element.bits == 8:
        return codes.view(torch.int8) if element.signed else codes
    return pack(codes, element.bits)


def _scale(
    level: Level, weight: TensorScheme, place: int, rows: int, columns: int, random: torch.Generator
) -> torch.Tensor:
    shape = scale_shape(level.granularity, rows, columns)
    uniform = torch.rand(shape, generator=random)
    if level.type == "e8m0":  # 2^-9 to 2^-6
        return (118 + 4 * uniform).to(torch.uint8)
    if level.type == "dynamic8":
        return (256 * uniform).to(torch.uint8)
    if level.type == "e4m3fn":
        return (0.5 + uniform).to(torch.float8_e4m3fn)
    if place:  # a coarser level
        return (0.5 + uniform) * 0.02
    return ((0.2 + uniform) * 0.1 / (1 << (min(weight.bits, 8) - 1))).to(torch.float16)


def _zeros(weight: TensorScheme, rows: int, columns: int, random: torch.Generator) -> torch.Tensor | None:
    if weight.zero is None:
        return None
    shape = scale_shape(weight.scales[0].granularity, rows, columns)
    if weight.zero == "float":
        return (torch.randn(shape, generator=random) * 0.02).to(torch.float16)
    middle = 1 << (weight.bits - 1)
    low, high = max(0, middle - 20), min(2 * middle, middle + 20)
    codes = torch.randint(low, high, shape, dtype=torch.uint8, generator=random)
    signed = isinstance(weight.element, Int) and weight.element.signed
    return (codes.to(torch.int16) - middle).to(torch.int8) if signed else codes


def _index(weight: TensorScheme, columns: int, random: torch.Generator) -> torch.Tensor:
    grid = weight.scales[0].granularity
    assert isinstance(grid, Group)
    return (torch.arange(columns) // grid.size)[torch.randperm(columns, generator=random)].to(torch.int32)


def _blocks(kind: str, rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    block = BLOCK_TYPES[kind]
    chosen = torch.randint(0, _POOL, (rows, columns // block.elements), generator=random)
    return _pool(kind)[chosen].flatten(1)


@cache
def _pool(kind: str) -> torch.Tensor:
    """uint8 [_POOL, bytes]: blocks of random bytes, kept where they stand for weights of ordinary size; where a type has
    its scales need not be known for that."""
    random = torch.Generator().manual_seed(0)
    kept: list[torch.Tensor] = []
    while sum(map(len, kept)) < _POOL:
        drawn = torch.randint(0, 256, (1 << 13, BLOCK_TYPES[kind].nbytes), dtype=torch.uint8, generator=random)
        size = dequantize_blocks(kind, drawn).square().mean(-1).sqrt()
        kept.append(drawn[(size > 0.01) & (size < 0.04)])
    return torch.cat(kept)[:_POOL]


def smallest_columns(scheme: Scheme) -> int:
    """The least number of input channels that a weight in the scheme can have: that of one block."""
    element = scheme.weight.element
    return BLOCK_TYPES[element.type].elements if isinstance(element, Block) else 1
