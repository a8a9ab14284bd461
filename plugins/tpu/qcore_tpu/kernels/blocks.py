"""ggml's block types: the same codes and the same scales, taken apart into planes. Scales that are whole numbers stay in 8 bits, under the float of 256 weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import block_parts
from qcore.blocks.lookup import FP4_DOUBLED, IQ4
from qcore.blocks.types import BLOCK_TYPES
from qcore.blocks.unpack import Parts, field
from qcore.elements import Block
from qcore_tpu.kernels.form import Form, block_of
from qcore_tpu.kernels.linear import ROWS, PlanesLinear, grouped
from qcore_tpu.kernels.planes import packed
from qcore_tpu.kernels.program import COLUMNS, ProductProgram, programs_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_COARSE = 256
"""Weights under a float, where scales are whole numbers."""
_SHORT = 512
"""Columns of a block, at most, where codes are looked up under scales of two levels."""


@dataclass(frozen=True)
class _Type:
    """bits, group, center: as of a Form. minimum: one is subtracted from each group. whole: scales and minima are whole numbers times the block's float16, over
    `unit`. values: of a table, over `unit` too; floats: codes are e2m1."""

    bits: int
    group: int
    center: int = 0
    minimum: bool = False
    whole: bool = False
    values: tuple[int, ...] = ()
    unit: int = 1
    floats: bool = False


def _signed(*magnitudes: int) -> tuple[int, ...]:
    return (*magnitudes, *(-m for m in magnitudes))


_TYPES: Mapping[str, _Type] = {
    "q4_0": _Type(4, 32, 8),
    "q4_1": _Type(4, 32, minimum=True),
    "q5_0": _Type(5, 32, 16),
    "q5_1": _Type(5, 32, minimum=True),
    "q8_0": _Type(8, 32),
    "q1_0": _Type(1, 128, values=(-1, 1)),
    "q2_0": _Type(2, 64, 1),
    "tq1_0": _Type(2, 256, 1),
    "tq2_0": _Type(2, 256, 1),
    "q2_k": _Type(2, 16, minimum=True, whole=True),
    "q3_k": _Type(3, 16, 4, whole=True),
    "q4_k": _Type(4, 32, minimum=True, whole=True),
    "q5_k": _Type(5, 32, minimum=True, whole=True),
    "q6_k": _Type(6, 16, 32, whole=True),
    "iq4_nl": _Type(4, 32, values=IQ4),
    "iq4_xs": _Type(4, 32, values=IQ4, whole=True),
    "iq3_xxs": _Type(4, 32, values=_signed(4, 12, 20, 28, 36, 44, 52, 62), unit=4, whole=True),
    "iq3_s": _Type(4, 32, values=_signed(1, 3, 5, 7, 9, 11, 13, 15), whole=True),
    "iq2_s": _Type(3, 16, values=_signed(8, 25, 43), unit=8, whole=True),
    "mxfp4": _Type(4, 32, values=FP4_DOUBLED, floats=True),
    "nvfp4": _Type(4, 16, values=FP4_DOUBLED, floats=True),
}


class BlockLinear(PlanesLinear):
    """w = code * scale - minimum."""

    @classmethod
    def form_of(cls, scheme: Scheme, columns: int) -> Form:
        found = _TYPES[kind_of(scheme)]
        block = block_of(columns, found.bits, math.lcm(found.group, _COARSE) if found.whole else found.group)
        if found.values and found.whole:  # which take the most of vector memory
            block = max(size for size in range(_COARSE, _SHORT + 1, _COARSE) if block % size == 0)
        form = Form(
            found.bits,
            block,
            found.group,
            found.center,
            coarse=_COARSE if found.whole else 0,
            zero="added" if found.minimum else "",
        )
        return replace(form, exponent=2, bias=1) if found.floats else replace(form, table=bool(found.values))

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[ProductProgram]:
        narrow = "bfloat16" if _TYPES[kind_of(scheme)].floats else "float32"
        return programs_of(cls.form_of(scheme, COLUMNS), str(scheme), dtype, narrow)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight, (rows, columns) = layer.weight, layer.weight.shape
        kind, form = kind_of(weight.scheme), cls.form_of(weight.scheme, columns)
        found, places = _TYPES[kind], torch.zeros(256, dtype=torch.uint8)
        for place, value in reversed(tuple(enumerate(found.values))):
            places[value % 256] = place
        scales: list[dict[str, torch.Tensor]] = []

        def codes() -> Iterator[torch.Tensor]:
            for part in weight.codes.split(ROWS):
                taken = block_parts(kind, part)
                scales.append(_scales(found, taken, part.reshape(-1, BLOCK_TYPES[kind].nbytes), kind))
                given = taken.codes.reshape(len(part), -1)
                if found.values:
                    yield places[given.view(torch.uint8).int()]
                else:
                    yield given if found.bits == 8 else (given + found.center).view(torch.uint8)

        planes = packed(codes(), form, rows, columns)
        parts = {name: torch.cat([some[name] for some in scales]).reshape(rows, -1).t() for name in scales[0]}
        groups = {
            name: grouped(part, form, columns, form.coarse if name.startswith("coarse") else form.group).contiguous()
            for name, part in parts.items()
        }
        return cls(form, planes, table=_table(found) if form.table else None, **groups)


def _scales(found: _Type, taken: Parts, blocks: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """`scales`, and `zeros` where there are minima, [blocks, groups]; where they are whole numbers `coarse` ones, [blocks, 1]."""
    if not found.whole:
        wide = {"scales": taken.scale * 2 if found.floats else taken.scale}
        wide |= {} if taken.minimum is None else {"zeros": -taken.minimum}
        return {name: part.to(torch.bfloat16) for name, part in wide.items()} if found.floats else wide
    coarse = field(blocks, torch.float16, BLOCK_TYPES[kind].fields[0][0], 1 + found.minimum).to(torch.float32)
    made = {"scales": _whole(taken.scale, coarse[:, :1] / found.unit), "coarse": coarse[:, :1]}
    if taken.minimum is not None:
        made |= {"zeros": _whole(taken.minimum, coarse[:, 1:]), "coarse_zeros": -coarse[:, 1:]}
    return made


def _whole(products: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """int8: the whole numbers that `products` are times `unit`; 0 where the unit is none."""
    return torch.nan_to_num(products / unit, 0.0, 0.0, 0.0).round().to(torch.int8)


def _table(found: _Type) -> torch.Tensor:
    """float32 [1, 2^bits]; places that no code has are zeros."""
    values = torch.tensor([found.values], dtype=torch.float32) / found.unit
    return torch.nn.functional.pad(values, (0, (1 << found.bits) - len(found.values)))


def kind_of(scheme: Scheme) -> str:
    """ggml's name of the type."""
    assert isinstance(scheme.weight.element, Block)
    return scheme.weight.element.type
