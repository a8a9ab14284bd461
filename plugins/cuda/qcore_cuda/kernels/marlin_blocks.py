"""ggml's blocks on Marlin's kernels (native/): those that hold integers of 4 or 8 bits, or places in a table of 16 numbers, under scales and without minima.

Codes and scales stand beside each other then, as any other weight's; both are the blocks' own, so that nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import block_parts
from qcore.blocks.lookup import FP4_DOUBLED, IQ4
from qcore.elements import Block
from qcore_cuda.kernels.marlin import ROWS, MarlinLinear, SmallMarlinLinear, permuted, programs_of, table_of
from qcore_cuda.kernels.marlin_product import PRODUCT, Form

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors
    from qcore_cuda.cpp import CppProgram


@dataclass(frozen=True)
class _Type:
    """code: of native/codes.cuh. group: columns of a scale. scales: the narrowest type that holds them all. center: what integers are held higher by.
    values: what places in the table stand for, and integers in a type of 16 bits."""

    code: str
    group: int
    scales: torch.dtype
    center: int = 0
    values: tuple[int, ...] = ()


_TYPES: Mapping[str, _Type] = {
    "q4_0": _Type("Int4", 32, torch.float16, 8),
    "q8_0": _Type("Int8", 32, torch.float16, 128),
    "iq4_nl": _Type("Table4", 32, torch.float16, values=IQ4),
    "iq4_xs": _Type("Table4", 32, torch.float32, values=IQ4),  # a float16 times six bits
    "mxfp4": _Type("Table4", 32, torch.bfloat16, values=FP4_DOUBLED),  # powers of two, from 2^-128 on
    "nvfp4": _Type("Table4", 16, torch.float16, values=FP4_DOUBLED),  # halves of e4m3's numbers
}


class MarlinBlockLinear(MarlinLinear):
    """Buffers as MarlinLinear's."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight, kind = layer.weight, _kind(layer.weight.scheme)
        found, place = _TYPES[kind], layer.weight.codes.device
        packed, scales = [], []
        for blocks in weight.codes.split(ROWS):
            part = block_parts(kind, blocks)
            codes = _codes(found, part.codes.reshape(len(blocks), -1))
            packed.append(permuted(codes, found.code).flatten())
            scales.append(part.scale.to(found.scales).view(len(blocks), -1))
        table = table_of(torch.tensor(found.values, device=place), dtype) if found.values else None
        return cls.of_parts(_form(found, dtype), found.center, packed, torch.cat(scales).t().contiguous(), table=table)

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[CppProgram | Program]:
        return programs_of(_form(_TYPES[_kind(scheme)], getattr(torch, dtype)), target)


class SmallMarlinBlockLinear(MarlinBlockLinear):
    """The same as SmallMarlinLinear is."""

    SHARED = SmallMarlinLinear.SHARED


def _kind(scheme: Scheme) -> str:
    """ggml's name of the type."""
    element = scheme.weight.element
    assert isinstance(element, Block)
    return element.type


def _form(found: _Type, dtype: torch.dtype) -> Form:
    return Form(found.code, found.group // PRODUCT, False, dtype, found.scales)


def _codes(found: _Type, numbers: torch.Tensor) -> torch.Tensor:
    """uint8, as `permuted` takes them. numbers: int8, before they are scaled."""
    numbers = numbers.view(torch.uint8)
    if not found.values:
        return numbers + found.center  # wraps
    places = numbers.new_zeros(256)
    for place, value in reversed(tuple(enumerate(found.values))):
        places[value % 256] = place
    return places[numbers.int()]
