"""Integers, small floats and codebooks of the canonical layout in the kernels' words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qcore.elements import Codebook, FlatGroup, Float, Group, Int, PerChannel, PerTensor, Tile
from qcore.refusal import Refusal, Refused
from qcore.tensor import float_table
from qcore_cpu.packed import (
    CHUNK,
    E4M3,
    E8M0,
    FLOAT_OFFSET,
    FLOAT_SCALES,
    FLOATS,
    TABLE4,
    TABLE8,
    ZERO_S8,
    ZERO_U8,
    Header,
    Parts,
    Source,
    contents_unsupported,
)

if TYPE_CHECKING:
    from qcore.tensor import QuantizedTensor


def element_parts(weight: QuantizedTensor) -> Parts:
    scheme, (rows, columns) = weight.scheme.weight, weight.shape
    header = Header(rows=rows, columns=columns, coarse_group=1)
    element, flip, codes, table = scheme.element, 0, weight.codes, None
    if isinstance(element, Int):
        header.code = element.bits
        header.zero = 1 << (element.bits - 1) if element.signed and element.bits < 8 else 0
        flip = 0x80 if element.bits == 8 and not element.signed else 0
    elif isinstance(element, Codebook) or (isinstance(element, Float) and element.format == "e2m1"):
        header.code = TABLE4
        table = float_table(element.format) if isinstance(element, Float) else weight.table
        assert table is not None, "a codebook travels with its tensor"
        table = table.to(torch.float32)
    else:
        assert isinstance(element, Float)
        header.code = FLOATS[element.format]
        codes = codes.view(torch.uint8)
        _refuse_special(element.format, codes)
    order = None
    if weight.index is not None:
        order = torch.argsort(weight.index, stable=True)
    scales, header.group = _grouped(weight, weight.scales[0])
    if weight.index is not None:
        counts = torch.bincount(weight.index, minlength=scales.shape[1])
        whole = counts[:-1] == header.group
        if not bool(whole.all()) or int(counts[-1]) > header.group:
            raise Refused(
                Refusal("shape-unsupported", "notimpl", "qcore_cpu::linear", "act-order groups must all be of one size",
                        f"found groups of {int(counts.min())} to {int(counts.max())} columns, expected {header.group}",
                        "Another kernel takes this layer.")
            )  # fmt: skip
    parts = Parts(header, Source([codes], element.bits, flip), scales, order=order, table=table)
    _fill_scales(parts, scales, weight)
    _fill_zeros(parts, weight)
    return parts


def _grouped(weight: QuantizedTensor, part: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A part in the shape of the finest level as [N, groups], and the columns of a group."""
    grid, (rows, columns) = weight.scheme.weight.scales[0].granularity, weight.shape
    padded = -(-columns // CHUNK) * CHUNK
    if isinstance(grid, Group):
        if columns > grid.size:
            return part, grid.size
        return part, padded
    if isinstance(grid, PerChannel):
        return part, padded
    if isinstance(grid, PerTensor):
        return part.expand(rows, 1), padded
    if isinstance(grid, FlatGroup):
        return part.flatten()[: rows * columns // grid.size].view(rows, columns // grid.size), grid.size
    assert isinstance(grid, Tile)
    return part.repeat_interleave(grid.rows, 0)[:rows], grid.cols if columns > grid.cols else padded


def _fill_scales(parts: Parts, scales: torch.Tensor, weight: QuantizedTensor) -> None:
    header, levels = parts.header, weight.scheme.weight.scales
    kind = levels[0].type
    if kind == "float":
        if len(levels) == 2:
            scales = (scales.double() * weight.scales[1].double()).to(torch.float32)
        scales = scales if scales.dtype in FLOAT_SCALES else scales.to(torch.float32)
        header.scale = FLOAT_SCALES[scales.dtype]
    elif kind == "e8m0":
        if bool((scales == 255).any()):
            raise contents_unsupported("scales that are no numbers")
        header.scale = E8M0
    elif kind == "e4m3fn":
        scales = scales.view(torch.uint8)
        if bool((scales & 0x7F == 0x7F).any()):
            raise contents_unsupported("scales that are no numbers")
        header.scale = E4M3
        header.tensor_scale = float(weight.scales[1].to(torch.float32)) if len(levels) == 2 else 1.0
    else:
        assert kind == "dynamic8"
        header.scale = TABLE8
        groups = scales.shape[1]
        coarse = levels[1].granularity
        assert isinstance(coarse, FlatGroup)
        fine = coarse.size // header.group
        header.coarse_group = math.gcd(groups, fine)
        places = torch.arange(0, scales.numel(), header.coarse_group) // fine
        parts.super_scales = weight.scales[1].flatten().to(torch.float32)[places].view(weight.shape[0], -1)
        header.shift = 0.0 if weight.offset is None else float(weight.offset)
        assert weight.table is not None and weight.scale_table is not None
        parts.table = torch.cat([weight.table.to(torch.float32), weight.scale_table.to(torch.float32)])
    parts.scales = scales


def _fill_zeros(parts: Parts, weight: QuantizedTensor) -> None:
    header, scheme = parts.header, weight.scheme.weight
    if weight.zeros is None:
        return
    zeros, _ = _grouped(weight, weight.zeros)
    assert parts.scales is not None and isinstance(parts.codes, Source)
    flipped = parts.codes.flip  # codes are held 128 lower
    if scheme.zero == "float":
        if zeros.dtype != parts.scales.dtype:
            zeros, parts.scales = zeros.to(torch.float32), parts.scales.to(torch.float32)
            header.scale = FLOAT_SCALES[torch.float32]
        header.offset, parts.offsets = FLOAT_OFFSET, zeros
        if flipped:
            header.zero = -128
        return
    if flipped:
        zeros = (zeros.to(torch.int16) - 128).to(torch.int8)
    header.offset = ZERO_S8 if zeros.dtype == torch.int8 else ZERO_U8
    parts.offsets = zeros


def _refuse_special(name: str, codes: torch.Tensor) -> None:
    """The kernels read every code as a number."""
    special = {
        "e4m3fn": lambda c: c & 0x7F == 0x7F,
        "e4m3fnuz": lambda c: c == 0x80,
        "e5m2": lambda c: c & 0x7C == 0x7C,
    }.get(name)
    if special is not None and bool(special(codes).any()):
        raise contents_unsupported("codes that are no numbers")
