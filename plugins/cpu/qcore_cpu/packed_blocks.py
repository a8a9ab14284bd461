"""ggml's block types in the kernels' words: the same codes and the same scales, taken apart.

Codes of three types with grids (IQ2_S, IQ3_XXS, IQ3_S) become indexes into the few values that their grids are made of, 3 or 4
bits each: up to 1.46 times the memory, and no lookups of tuples when they are multiplied. The smaller ones stay as they are.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import block_parts
from qcore.blocks.grids import grid, shifted_grid
from qcore.blocks.lookup import FP4_DOUBLED, IQ4
from qcore.blocks.types import BLOCK_TYPES
from qcore.blocks.unpack import field
from qcore.elements import Block
from qcore_cpu.library import register
from qcore_cpu.packed import (
    E4M3,
    E8M0,
    F16,
    FLOAT_OFFSET,
    NIBBLE_OFFSETS,
    NIBBLES,
    RUN_OFFSETS,
    RUNS,
    TABLE3,
    TABLE4,
    Blocks,
    Header,
    Parts,
    Source,
    contents_unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qcore.tensor import QuantizedTensor

_ROWS = 256
"""Rows taken apart at a time."""


@dataclass(frozen=True)
class _Form:
    """code: bits of a code, or a table's kind. zero: what is subtracted from codes. group: weights under one scale.

    scale, offset: how a group's are stored (`Header`). factor: what scales are multiplied by. table: the values that codes name,
    whole but where `unit` divides them.
    """

    code: int
    zero: int
    group: int
    scale: int = F16
    offset: int = 0
    factor: float = 1.0
    table: tuple[int, ...] = ()
    unit: float = 1.0


def _signed(*magnitudes: int) -> tuple[int, ...]:
    return (*magnitudes, *(-m for m in magnitudes))


_IQ2 = _signed(8, 25, 43)
_IQ3_XXS, _IQ3_S = _signed(4, 12, 20, 28, 36, 44, 52, 62), _signed(1, 3, 5, 7, 9, 11, 13, 15)

_FORMS: Mapping[str, _Form] = {
    "q4_0": _Form(4, 8, 32),
    "q4_1": _Form(4, 0, 32, offset=FLOAT_OFFSET),
    "q5_0": _Form(5, 16, 32),
    "q5_1": _Form(5, 0, 32, offset=FLOAT_OFFSET),
    "q8_0": _Form(8, 0, 32),
    "q1_0": _Form(1, 0, 128, offset=FLOAT_OFFSET),
    "q2_0": _Form(2, 1, 64),
    "tq1_0": _Form(2, 1, 256),
    "tq2_0": _Form(2, 1, 256),
    "q2_k": _Form(2, 0, 16, NIBBLES, NIBBLE_OFFSETS),
    "q3_k": _Form(3, 4, 16, RUNS),
    "q4_k": _Form(4, 0, 32, RUNS, RUN_OFFSETS),
    "q5_k": _Form(5, 0, 32, RUNS, RUN_OFFSETS),
    "q6_k": _Form(6, 32, 16, RUNS),
    "iq4_nl": _Form(TABLE4, 0, 32, table=IQ4),
    "iq4_xs": _Form(TABLE4, 0, 32, RUNS, table=IQ4),
    "iq3_xxs": _Form(TABLE4, 0, 32, RUNS, factor=0.25, table=_IQ3_XXS),
    "iq3_s": _Form(TABLE4, 0, 32, RUNS, table=_IQ3_S),
    "iq2_s": _Form(TABLE3, 0, 16, RUNS, factor=0.125, table=_IQ2),
    "mxfp4": _Form(TABLE4, 0, 32, E8M0, table=FP4_DOUBLED, unit=0.5),
    "nvfp4": _Form(TABLE4, 0, 16, E4M3, table=FP4_DOUBLED, unit=0.5),
}

_GRIDS: Mapping[str, tuple[int, int]] = {"iq2_xxs": (48, 32), "iq2_xs": (49, 16), "iq1_s": (50, 32), "iq1_m": (51, 16)}
"""Types whose blocks stay as they are: Header.code, and weights under one scale."""


def block_parts_of(weight: QuantizedTensor) -> Parts:
    """Raises Refused (contents-unsupported) where a scale is no number."""
    element = weight.scheme.weight.element
    assert isinstance(element, Block)
    rows, columns = weight.shape
    if element.type in _GRIDS:
        return _grid_parts(weight, element.type)
    form, kind = _FORMS[element.type], BLOCK_TYPES[element.type].id
    header = Header(
        rows=rows, columns=columns, code=form.code, zero=form.zero, group=form.group, coarse_group=1, scale=form.scale, offset=form.offset,
        tensor_scale=form.factor,
    )  # fmt: skip
    if register().qcore_reads_blocks(ctypes.c_int64(kind)):
        parts = Parts(header, Blocks(weight.codes, kind))
    else:
        parts = _taken_apart(header, weight, element.type)
    if form.table:
        values = torch.tensor(form.table, dtype=torch.float32) * form.unit
        parts.table = torch.nn.functional.pad(values, (0, 16 - len(values)))
    return parts


def _grid_parts(weight: QuantizedTensor, kind: str) -> Parts:
    rows, columns = weight.shape
    code, group = _GRIDS[kind]
    blocks = weight.codes.reshape(-1, BLOCK_TYPES[kind].nbytes)
    d = _scattered_half(blocks) if kind == "iq1_m" else field(blocks, torch.float16, 0)
    if not bool(torch.isfinite(d).all()):
        raise contents_unsupported("scales that are no numbers")
    header = Header(rows=rows, columns=columns, code=code, group=group, coarse_group=1)
    table = shifted_grid(d.device) if kind.startswith("iq1") else grid(kind, d.device)
    return Parts(header, Blocks(weight.codes, 0), table=table)


def _scattered_half(blocks: torch.Tensor) -> torch.Tensor:
    """iq1_m's float16: a hex digit of it on top of each of four words."""
    words = field(blocks, torch.int16, 48, 4).int()
    digits = [(word >> 12 & 15) << 4 * place for place, word in enumerate(words.unbind(1))]
    return torch.stack(digits, 1).sum(1, keepdim=True).to(torch.int16).view(torch.float16)


def _taken_apart(header: Header, weight: QuantizedTensor, kind: str) -> Parts:
    """Types with codes that are no fields of bits: TQ1_0, NVFP4, and those with grids."""
    blocks = weight.codes.reshape(-1, BLOCK_TYPES[kind].nbytes)
    parts = Parts(header, Source(_codes(weight, kind), 8))
    if kind == "nvfp4":
        exponents = blocks[:, :4] & 0x7F
        parts.scales = exponents.masked_fill(exponents == 0x7F, 0).view(header.rows, -1)
        return parts
    d = field(blocks, torch.float16, 52 if kind == "tq1_0" else 0)
    if not bool(torch.isfinite(d).all()):
        raise contents_unsupported("scales that are no numbers")
    d = d.view(header.rows, -1)
    if header.scale == F16:
        parts.scales = d
        return parts
    pieces = [
        _whole(block_parts(kind, piece).scale, field(piece, torch.float16, 0).float() * header.tensor_scale)
        for piece in blocks.split(_ROWS * 16)
    ]
    parts.scales, parts.super_scales = torch.cat(pieces).to(torch.int8).view(header.rows, -1), d
    return parts


def _codes(weight: QuantizedTensor, kind: str) -> Iterator[torch.Tensor]:
    """uint8 [rows, K], some rows after the other: codes as the kernels have them, unsigned below 8 bits."""
    form = _FORMS[kind]
    places = torch.zeros(256, dtype=torch.uint8)
    for place, value in reversed(tuple(enumerate(form.table))):
        places[value % 256] = place
    for start in range(0, weight.shape[0], _ROWS):
        part = weight.codes[start : start + _ROWS]
        codes = block_parts(kind, part).codes.view(torch.uint8).reshape(len(part), -1)
        yield places[codes.int()] if form.table else codes + form.zero


def _whole(products: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The whole numbers that `products` are times `unit`; 0 where the unit is."""
    return torch.where(unit == 0, 0.0, products / unit).round()
