"""Small floats of 4 to 8 bits: w = q * s, under float scales, powers of two (MX) or e4m3 scales under one of the whole tensor (NVFP4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Float, PerTensor
from qcore.kernels.scales import by_group, group_size
from qcore.kernels.triton.linear import PlanesLinear, rows_of
from qcore.kernels.triton.product import Form, programs_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_SPECIAL = {"e4m3fn": (0x7F, 0x7F), "e4m3fnuz": (0xFF, 0x80), "e5m2": (0x7C, 0x7C)}
"""Mask and value of the codes that are no finite numbers, which the product would take for numbers."""
_NO_NUMBER: dict[str, float] = {"plain": float("nan"), "e8m0": 255, "e4m3fn": 0x7F}
"""The scale that is none, by its type."""


class FloatLinear(PlanesLinear):
    """Codes become float16 or bfloat16 by moving their bits. Where a code is no number, its group's scale becomes none, so that the result is none."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight, form = layer.weight, _form(layer.weight.scheme)
        levels, rows = weight.scheme.weight.scales, weight.shape[0]
        scales = by_group(
            weight.scales[0].view(torch.uint8) if form.scale != "plain" else weight.scales[0],
            levels[0].granularity,
            rows,
        )
        coarse = weight.scales[1].to(torch.float32).expand(1, 1, rows).contiguous() if form.coarse_group else None
        made = cls(form, rows_of(weight), scales, coarse=coarse)
        element = weight.scheme.weight.element
        if isinstance(element, Float) and element.format in _SPECIAL:
            mask, value = _SPECIAL[element.format]
            for row, column in (weight.codes.view(torch.uint8) & mask == value).nonzero().tolist():
                made.scales[column // form.group if form.group else 0, row] = _NO_NUMBER[form.scale]
        return made

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        form = _form(scheme)
        scales = torch.float32 if form.scale == "plain" else torch.uint8
        return programs_of(form, str(scheme), scales, torch.float32 if form.coarse_group else None, None, dtype, target)


def _form(scheme: Scheme) -> Form:
    fine, *coarse = scheme.weight.scales
    assert all(isinstance(level.granularity, PerTensor) for level in coarse)
    element = scheme.weight.element
    assert isinstance(element, Float)
    exponent = int(element.format[1])
    bias = (1 << (exponent - 1)) - (element.format != "e4m3fnuz")
    return Form(
        element.bits, group_size(fine.granularity), exponent=exponent, bias=bias, scale="plain" if fine.type == "float" else fine.type,
        coarse_group=_ALL if coarse else 0,
    )  # fmt: skip


_ALL = 1 << 30
"""Columns under a scale of the whole tensor."""
