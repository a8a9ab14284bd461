"""ggml's block types, taken apart: codes in planes, whole scales under a float16 for 256 weights as the blocks have them, and for IQ1, IQ2 and IQ3 tuples of
4 or 8 weights by their places in the grids, and their signs. They become bfloat16 at every call, as in dense.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import block_parts
from qcore.blocks.grids import grid, shifted_grid
from qcore.blocks.lookup import FP4_DOUBLED, IQ4
from qcore.blocks.types import BLOCK_TYPES
from qcore.blocks.unpack import Parts, field
from qcore.elements import Block
from qcore_gaudi.kernels.dense import DenseLinear
from qcore_gaudi.kernels.planes import packed, unpacked

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors

_ROWS = 64
"""Rows repacked at a time."""
_SIGNS = torch.tensor([1.0, -1.0])
"""Scales are multiplied, minima subtracted."""


@dataclass(frozen=True)
class _Type:
    """bits: of a code, or of a tuple's place in the grid. center: what is taken from codes. values: of a table's codes. tuples: weights of a tuple. unit: what
    the whole scales are multiples of, over the block's float16; 0 where scales are floats."""

    bits: int
    center: int = 0
    values: tuple[int, ...] = ()
    tuples: int = 0
    unit: float = 0.0


_TYPES: Mapping[str, _Type] = MappingProxyType(
    {
        "q4_0": _Type(4, 8), "q4_1": _Type(4), "q5_0": _Type(5, 16), "q5_1": _Type(5), "q8_0": _Type(8, 128), "q2_0": _Type(2, 1),
        "q1_0": _Type(1, values=(-1, 1)), "tq1_0": _Type(2, 1), "tq2_0": _Type(2, 1),
        "q2_k": _Type(2, unit=1), "q3_k": _Type(3, 4, unit=1), "q4_k": _Type(4, unit=1), "q5_k": _Type(5, unit=1), "q6_k": _Type(6, 32, unit=1),
        "iq4_nl": _Type(4, values=IQ4), "iq4_xs": _Type(4, values=IQ4, unit=1), "mxfp4": _Type(4, values=FP4_DOUBLED), "nvfp4": _Type(4, values=FP4_DOUBLED),
        "iq1_s": _Type(12, tuples=8, unit=1 / 8), "iq1_m": _Type(12, tuples=8, unit=1 / 8),
        "iq2_xxs": _Type(8, tuples=8, unit=1 / 8), "iq2_xs": _Type(9, tuples=8, unit=1 / 8), "iq2_s": _Type(10, tuples=8, unit=1 / 8),
        "iq3_xxs": _Type(8, tuples=4, unit=1 / 4), "iq3_s": _Type(9, tuples=4, unit=1),
    }
)  # fmt: skip


class BlockLinear(DenseLinear):
    """scales, zeros: int8 or uint8 [N, groups] where they are whole, under coarse: float32 [N, blocks, 1 or 2]. signs: int32 [N, words], a bit for each weight
    of a tuple; sign_values: float32 [2^n, n]. values: float32 [2^bits], or [entries, n] of tuples."""

    tuples: int
    coarse: torch.Tensor | None
    signs: torch.Tensor | None
    sign_values: torch.Tensor | None

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        element, columns = weight.scheme.weight.element, weight.shape[1]
        assert isinstance(element, Block)
        kind, found = element.type, _TYPES[element.type]
        keys, order = _tuples(kind) if found.tuples else (None, None)
        codes, signs, scales, zeros, coarse = [], [], [], [], []
        for part in weight.codes.split(_ROWS):
            parts = block_parts(kind, part)
            values = parts.codes.reshape(len(part), -1)
            if keys is None or order is None:
                codes.append(packed(_places(values, found), found.bits))
            else:
                minus, magnitudes = _apart(values, kind)
                places = order[torch.searchsorted(keys, _keys(magnitudes, found.tuples))]
                codes.append(packed(places, found.bits))
                signs.append(packed(minus, found.tuples))
            unit = _unit(kind, part) * found.unit if found.unit else None
            scale, zero = _scales(parts, unit)
            scales.append(scale.reshape(len(part), -1))
            zeros += [] if zero is None else [zero.reshape(len(part), -1)]
            if unit is not None:
                coarse.append((unit * _SIGNS[: unit.shape[1]]).reshape(len(part), -1, unit.shape[1]))
        made = cls(columns, columns // scales[0].shape[1], found.bits, found.center, weight.scheme.input)
        made.added, made.tuples = bool(zeros), found.tuples
        table = torch.tensor(found.values, dtype=torch.float32) if found.values else None
        if found.tuples:
            table = _entries(kind).view(torch.int8).reshape(-1, found.tuples).to(torch.float32)
        ones = torch.arange(1 << found.tuples).unsqueeze(1) >> torch.arange(max(found.tuples, 1)) & 1
        signed = bool(found.tuples) and not kind.startswith("iq1")
        held = {"codes": codes, "scales": scales, "zeros": zeros, "coarse": coarse, "signs": signs if signed else []}
        for name, pieces in held.items():
            made.register_buffer(name, torch.cat(pieces) if pieces else None)
        rest = {"values": table, "sign_values": 1.0 - 2.0 * ones if signed else None}
        for name, tensor in (rest | dict.fromkeys(("order", "input_scale", "input_zero"))).items():
            made.register_buffer(name, tensor)
        return made

    def numbers(self) -> torch.Tensor:
        if not self.tuples:
            return super().numbers()
        assert self.values is not None and self.shifts is not None
        count = self.columns // self.tuples
        places = unpacked(self.codes, self.shifts, self.bits, count).reshape(-1)
        wide = self.values.index_select(0, places)
        if self.signs is not None and self.sign_values is not None:
            wide = wide * self.sign_values.index_select(
                0, unpacked(self.signs, self.shifts, self.tuples, count).reshape(-1)
            )
        return wide.reshape(-1, self.columns)

    def wide(self, part: torch.Tensor) -> torch.Tensor:
        if self.coarse is None:
            return super().wide(part)
        unit = self.coarse[..., 0:1] if part is self.scales else self.coarse[..., 1:2]
        whole = part.to(torch.float32).reshape(*self.coarse.shape[:2], -1)
        return (whole * unit).reshape(part.shape)


def _places(values: torch.Tensor, found: _Type) -> torch.Tensor:
    """uint8: what is stored of the codes' values."""
    if not found.values:
        return (values.to(torch.int16) + found.center).to(torch.uint8)
    places = torch.zeros(256, dtype=torch.uint8)
    for place, value in reversed(tuple(enumerate(found.values))):
        places[value % 256] = place
    return places[values.view(torch.uint8).int()]


def _apart(values: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs as bits of a number for each tuple, and what is in the grid: of IQ1 all, of the others magnitudes."""
    size = _TYPES[kind].tuples
    if kind.startswith("iq1"):
        return values.new_zeros(len(values), values.shape[1] // size, dtype=torch.uint8), values
    minus = (values < 0).unflatten(1, (-1, size)).to(torch.uint8) << torch.arange(size, dtype=torch.uint8)
    return minus.sum(2, dtype=torch.uint8), values.abs()


def _entries(kind: str) -> torch.Tensor:
    """The grid's tuples, each as one integer."""
    place = torch.device("cpu")
    return shifted_grid(place) if kind.startswith("iq1") else grid(kind, place)


def _tuples(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid's tuples in order, and the place of each."""
    keys, order = _entries(kind).flatten().sort()
    return keys, order.to(torch.int32)


def _keys(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.contiguous().view(torch.int64 if size == 8 else torch.int32)


def _unit(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """float32 [blocks, 1 or 2]: the float16 that a block's scales are under, and the one of what is subtracted."""
    blocks = rows.reshape(-1, BLOCK_TYPES[kind].nbytes)
    if kind == "iq1_m":  # its four hex digits are on top of the words of scales
        digits = field(blocks, torch.int16, 48, 4).int() >> 12 & 15
        joined = (digits << torch.tensor([0, 4, 8, 12], dtype=torch.int32)).sum(1, keepdim=True)
        return joined.to(torch.int16).view(torch.float16).to(torch.float32)
    offset, _, count = BLOCK_TYPES[kind].fields[0]
    return field(blocks, torch.float16, offset, count).to(torch.float32)


def _scales(parts: Parts, unit: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and what is added to scaled codes; whole numbers under a unit."""
    if unit is None:
        scale = parts.scale.to(torch.float16)
        exact = torch.equal(scale.to(torch.float32), parts.scale)
        return scale if exact else parts.scale, None if parts.minimum is None else -parts.minimum.to(torch.float16)
    if parts.minimum is None:
        return _whole(parts.scale, unit).to(torch.int8), None
    return _whole(parts.scale, unit[:, :1]).to(torch.uint8), _whole(parts.minimum, unit[:, 1:]).to(torch.uint8)


def _whole(products: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The whole numbers that products are times their unit; 0 where that is none."""
    return torch.nan_to_num(products / unit, 0.0, 0.0, 0.0).round()
