"""ggml's block types: the same codes and the same scales, taken apart into planes.

Codes of three types with grids (IQ2_S, IQ3_XXS, IQ3_S) become indexes into the few values that their grids are made of, 3 or 4
bits each: up to 1.46 times the memory, and no lookups of tuples when they are multiplied. The smaller ones are in grids.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import block_parts
from qcore.blocks.lookup import FP4_DOUBLED, IQ4
from qcore.blocks.types import BLOCK_TYPES
from qcore.blocks.unpack import field
from qcore.elements import Block
from qcore.kernels.triton.linear import ROWS, PlanesLinear
from qcore.kernels.triton.product import Form, programs_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors, QuantizedTensor


@dataclass(frozen=True)
class _Type:
    """form: what the parts become. values: of tables, over `unit`."""

    form: Form
    values: tuple[int, ...] = ()
    unit: int = 1

    @property
    def whole(self) -> bool:
        """Whether scales, and what is subtracted, are whole numbers times the block's float16."""
        return self.form.coarse_group > 0


def _plain(bits: int, group: int, center: int = 0, *, minimum: bool = False) -> _Type:
    return _Type(Form(bits, group, center, zero="added" if minimum else ""))


def _nested(bits: int, group: int, center: int = 0, *, minimum: bool = False) -> _Type:
    return _Type(Form(bits, group, center, coarse_group=256, zero="added" if minimum else ""))


def _table(bits: int, group: int, values: tuple[int, ...], *, unit: int = 1, whole: bool = True) -> _Type:
    return _Type(Form(bits, group, table=True, coarse_group=256 if whole else 0), values, unit)


def _signed(*magnitudes: int) -> tuple[int, ...]:
    return (*magnitudes, *(-m for m in magnitudes))


_TYPES: Mapping[str, _Type] = {
    "q4_0": _plain(4, 32, 8),
    "q4_1": _plain(4, 32, minimum=True),
    "q5_0": _plain(5, 32, 16),
    "q5_1": _plain(5, 32, minimum=True),
    "q8_0": _plain(8, 32, 128),
    "q1_0": _table(1, 128, (-1, 1), whole=False),
    "q2_0": _plain(2, 64, 1),
    "tq1_0": _plain(2, 256, 1),
    "tq2_0": _plain(2, 256, 1),
    "q2_k": _nested(2, 16, minimum=True),
    "q3_k": _nested(3, 16, 4),
    "q4_k": _nested(4, 32, minimum=True),
    "q5_k": _nested(5, 32, minimum=True),
    "q6_k": _nested(6, 16, 32),
    "iq4_nl": _table(4, 32, IQ4, whole=False),
    "iq4_xs": _table(4, 32, IQ4),
    "iq3_xxs": _table(4, 32, _signed(4, 12, 20, 28, 36, 44, 52, 62), unit=4),
    "iq3_s": _table(4, 32, _signed(1, 3, 5, 7, 9, 11, 13, 15)),
    "iq2_s": _table(3, 16, _signed(8, 25, 43), unit=8),
    "mxfp4": _Type(Form(4, 32, exponent=2, bias=1, scale="e8m0"), FP4_DOUBLED),
    "nvfp4": _Type(Form(4, 16, exponent=2, bias=1, scale="e4m3fn"), FP4_DOUBLED),
}


class BlockLinear(PlanesLinear):
    """Scales stay as they are: float16, whole numbers under a float16 for 256 weights, or small floats."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        kind = block_type(weight.scheme)
        found, rows = _TYPES[kind], weight.shape[0]
        scales, zeros, coarse = _scales(kind, weight.codes.reshape(-1, BLOCK_TYPES[kind].nbytes))
        place = weight.codes.device
        table = torch.tensor(found.values, dtype=dtype, device=place) / found.unit if found.form.table else None
        return cls(
            found.form,
            _codes(weight, kind),
            _by_group(scales, rows),
            coarse=None if coarse is None else torch.stack([_by_group(part, rows) for part in coarse.unbind(1)]),
            zeros=None if zeros is None else _by_group(zeros, rows),
            table=None if table is None else torch.nn.functional.pad(table, (0, (1 << found.form.bits) - len(table))),
        )

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        found = _TYPES[block_type(scheme)]
        scales = torch.float16 if found.form.scale == "plain" else torch.uint8
        if found.whole:
            scales = torch.uint8 if found.form.zero else torch.int8
        return programs_of(
            found.form,
            str(scheme),
            scales,
            torch.float16 if found.whole else None,
            scales if found.form.zero else None,
            dtype,
            target,
        )


def block_type(scheme: Scheme) -> str:
    """ggml's name of the type."""
    element = scheme.weight.element
    assert isinstance(element, Block)
    return element.type


def _by_group(part: torch.Tensor, rows: int) -> torch.Tensor:
    """[blocks, parts of each] -> [groups, N]."""
    return part.reshape(rows, -1).t().contiguous()


def _codes(weight: QuantizedTensor, kind: str) -> Iterator[torch.Tensor]:
    found = _TYPES[kind]
    places = torch.zeros(256, dtype=torch.uint8, device=weight.codes.device)
    for place, value in reversed(tuple(enumerate(found.values))):
        places[value % 256] = place
    for part in weight.codes.split(ROWS):
        codes = block_parts(kind, part).codes.reshape(len(part), -1).view(torch.uint8)
        yield places[codes.int()] if found.values else codes + found.form.center


def _scales(kind: str, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scales, what is added to scaled codes, and the float16 of both: [blocks, groups], the same, and [blocks, 1 or 2]."""
    found = _TYPES[kind]
    if found.form.scale == "e8m0":
        return blocks[:, :1], None, None
    if found.form.scale == "e4m3fn":
        exponents = blocks[:, :4] & 0x7F
        return exponents.masked_fill(exponents == 0x7F, 0), None, None
    pieces = [block_parts(kind, piece) for piece in blocks.split(ROWS * 16)]
    scales = torch.cat([piece.scale for piece in pieces])
    minima = torch.cat([piece.minimum for piece in pieces if piece.minimum is not None]) if found.form.zero else None
    if not found.whole:
        return scales.to(torch.float16), None if minima is None else -minima.to(torch.float16), None
    coarse = field(blocks, torch.float16, BLOCK_TYPES[kind].fields[0][0], 1 if minima is None else 2)
    narrow = torch.int8 if minima is None else torch.uint8
    wholes = [
        whole(part, coarse[:, place : place + 1].float() / found.unit).to(narrow)
        for place, part in enumerate([scales, *([] if minima is None else [minima])])
    ]
    if minima is not None:
        coarse = coarse * coarse.new_tensor([1, -1])
    return wholes[0], wholes[1] if minima is not None else None, coarse


def whole(products: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The whole numbers that `products` are times `unit`; 0 where the unit is none."""
    return torch.nan_to_num(products / unit, 0.0, 0.0, 0.0).round()
