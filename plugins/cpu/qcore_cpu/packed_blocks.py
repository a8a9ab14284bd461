"""ggml's block types in the kernels' words: the same codes and the same scales, taken apart.

Codes of three types with grids (IQ2_S, IQ3_XXS, IQ3_S) become indexes into the few values that their grids are made of, 3 or 4
bits each: up to 1.46 times the memory, and no lookups of tuples when they are multiplied. The smaller ones stay as they are.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
    FLOAT_OFFSET,
    FLOAT_SCALES,
    NIBBLE_OFFSETS,
    NIBBLES,
    RUN_OFFSETS,
    RUNS,
    TABLE3,
    TABLE4,
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

    scales: "half", the block's float16 itself; "bit", twice of it, and it is subtracted again; "runs", a whole number for each group times the float16 and `factor`; "e8m0" and
    "e4m3", a byte for each group. minima: whether there are offsets, of the same kind as the scales. at, minimum_at: where the
    float16 of scales and of minima stand in a block. table: the values that codes name, whole but where `unit` divides them.
    """

    code: int
    zero: int
    group: int
    scales: Literal["half", "bit", "runs", "nibbles", "e8m0", "e4m3"]
    at: int = 0
    minima: bool = False
    minimum_at: int = 2
    factor: float = 1.0
    table: tuple[int, ...] = ()
    unit: float = 1.0


def _signed(*magnitudes: int) -> tuple[int, ...]:
    return (*magnitudes, *(-m for m in magnitudes))


_IQ2 = _signed(8, 25, 43)
_IQ3_XXS, _IQ3_S = _signed(4, 12, 20, 28, 36, 44, 52, 62), _signed(1, 3, 5, 7, 9, 11, 13, 15)

_FORMS: Mapping[str, _Form] = {
    "q4_0": _Form(4, 8, 32, "half"),
    "q4_1": _Form(4, 0, 32, "half", minima=True),
    "q5_0": _Form(5, 16, 32, "half"),
    "q5_1": _Form(5, 0, 32, "half", minima=True),
    "q8_0": _Form(8, 0, 32, "half"),
    "q1_0": _Form(1, 0, 128, "bit"),
    "q2_0": _Form(2, 1, 64, "half"),
    "tq1_0": _Form(2, 1, 256, "half", at=52),
    "tq2_0": _Form(2, 1, 256, "half", at=64),
    "q2_k": _Form(2, 0, 16, "nibbles", at=80, minima=True, minimum_at=82),
    "q3_k": _Form(3, 4, 16, "runs", at=108),
    "q4_k": _Form(4, 0, 32, "runs", minima=True),
    "q5_k": _Form(5, 0, 32, "runs", minima=True),
    "q6_k": _Form(6, 32, 16, "runs", at=208),
    "iq4_nl": _Form(TABLE4, 0, 32, "half", table=IQ4),
    "iq4_xs": _Form(TABLE4, 0, 32, "runs", table=IQ4),
    "iq3_xxs": _Form(TABLE4, 0, 32, "runs", factor=0.25, table=_IQ3_XXS),
    "iq3_s": _Form(TABLE4, 0, 32, "runs", table=_IQ3_S),
    "iq2_s": _Form(TABLE3, 0, 16, "runs", factor=0.125, table=_IQ2),
    "mxfp4": _Form(TABLE4, 0, 32, "e8m0", table=FP4_DOUBLED, unit=0.5),
    "nvfp4": _Form(TABLE4, 0, 16, "e4m3", table=FP4_DOUBLED, unit=0.5),
}

_KINDS = {"runs": RUNS, "nibbles": NIBBLES, "e8m0": E8M0, "e4m3": E4M3}
_OFFSETS = {"runs": RUN_OFFSETS, "nibbles": NIBBLE_OFFSETS}

_GRIDS: Mapping[str, tuple[int, int]] = {"iq2_xxs": (48, 32), "iq2_xs": (49, 16), "iq1_s": (50, 32), "iq1_m": (51, 16)}
"""Types whose blocks stay as they are: Header.code, and weights under one scale."""


def block_parts_of(weight: QuantizedTensor) -> Parts:
    """Raises Refused (contents-unsupported) where a scale is no number."""
    element = weight.scheme.weight.element
    assert isinstance(element, Block)
    rows, columns = weight.shape
    if element.type in _GRIDS:
        return _grid_parts(weight, element.type)
    form = _FORMS[element.type]
    header = Header(rows=rows, columns=columns, code=form.code, zero=form.zero, group=form.group, coarse_group=1)
    pieces = [
        _scales(element.type, form, weight.codes[start : start + _ROWS].reshape(-1, BLOCK_TYPES[element.type].nbytes))
        for start in range(0, rows, _ROWS)
    ]
    scales, offsets, super_scales, super_offsets = (
        None if part[0] is None else torch.cat(part).view(rows, -1) for part in zip(*pieces, strict=True)
    )
    assert scales is not None
    kind = BLOCK_TYPES[element.type].id
    native = register().qcore_reads_blocks(ctypes.c_int64(kind))
    source = Source([weight.codes], -kind) if native else Source(_codes(weight, form), 8)
    parts = Parts(header, source, scales, offsets, super_scales, super_offsets)
    header.scale = _KINDS.get(form.scales, FLOAT_SCALES[torch.float16])
    header.tensor_scale = form.factor
    if offsets is not None or super_offsets is not None:
        header.offset = _OFFSETS.get(form.scales, FLOAT_OFFSET)
    if form.table:
        values = torch.tensor(form.table, dtype=torch.float32) * form.unit
        parts.table = torch.nn.functional.pad(values, (0, 16 - len(values)))
    return parts


def _grid_parts(weight: QuantizedTensor, kind: str) -> Parts:
    rows, columns = weight.shape
    code, group = _GRIDS[kind]
    blocks = weight.codes.reshape(-1, BLOCK_TYPES[kind].nbytes)
    d = _scattered_half(blocks) if kind == "iq1_m" else blocks[:, :2].clone().view(torch.float16)
    if not bool(torch.isfinite(d).all()):
        raise contents_unsupported("scales that are no numbers")
    header = Header(rows=rows, columns=columns, code=code, group=group, coarse_group=1)
    table = shifted_grid(d.device) if kind.startswith("iq1") else grid(kind, d.device)
    return Parts(header, Source([], 8), None, table=table, grid=weight.codes)


def _scattered_half(blocks: torch.Tensor) -> torch.Tensor:
    """iq1_m's float16: a hex digit of it on top of each of four words."""
    words = field(blocks, torch.int16, 48, 4).int()
    digits = [(word >> 12 & 15) << 4 * place for place, word in enumerate(words.unbind(1))]
    return torch.stack(digits, 1).sum(1, keepdim=True).to(torch.int16).view(torch.float16)


def _codes(weight: QuantizedTensor, form: _Form) -> Iterator[torch.Tensor]:
    """uint8 [rows, K], a block of rows after the other: codes as the kernels have them, unsigned below 8 bits."""
    element = weight.scheme.weight.element
    assert isinstance(element, Block)
    places = torch.zeros(256, dtype=torch.uint8)
    for place, value in reversed(tuple(enumerate(form.table))):
        places[value % 256] = place
    for start in range(0, weight.shape[0], _ROWS):
        block = weight.codes[start : start + _ROWS]
        codes = block_parts(element.type, block).codes.view(torch.uint8).reshape(len(block), -1)
        if form.scales == "bit":  # 1 and -1
            codes = codes + 1 >> 1
        elif form.table:
            codes = places[codes.int()]
        elif form.zero:
            codes = codes + form.zero
        yield codes


def _scales(kind: str, form: _Form, blocks: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Scales, offsets and what stands above both, each [blocks, groups of a block] or [blocks, 1]."""
    if form.scales == "e8m0":
        exponents = blocks[:, :1].clone()
        if bool((exponents == 255).any()):  # 2^127 here; no number to the kernels
            raise contents_unsupported("scales of 2^127")
        return exponents, None, None, None
    if form.scales == "e4m3":
        bytes_ = blocks[:, :4] & 0x7F
        return bytes_.masked_fill(bytes_ == 0x7F, 0), None, None, None
    d = blocks[:, form.at : form.at + 2].clone().view(torch.float16)
    low = blocks[:, form.minimum_at : form.minimum_at + 2].clone().view(torch.float16) if form.minima else None
    if not bool(torch.isfinite(d).all()) or (low is not None and not bool(torch.isfinite(low).all())):
        raise contents_unsupported("scales that are no numbers")
    if form.scales == "bit":
        if bool((d.abs() > torch.finfo(torch.float16).max / 2).any()):
            raise contents_unsupported("scales above 32752")
        return d * 2, -d, None, None
    if form.scales == "half":
        return d, low, None, None
    parts = block_parts(kind, blocks)
    codes = _whole(parts.scale, d.float() * form.factor)
    if low is None:
        return codes.to(torch.int8), None, d, None
    assert parts.minimum is not None
    minima = _whole(parts.minimum, low.float())
    if form.scales == "nibbles":
        return (codes + 16 * minima).to(torch.uint8), None, d, low
    return codes.to(torch.int8), minima.to(torch.uint8), d, low


def _whole(products: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The whole numbers that `products` are times `unit`; 0 where the unit is."""
    return torch.where(unit == 0, 0.0, products / unit).round()
