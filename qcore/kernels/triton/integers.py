"""Integers of 1 to 8 bits: w = (q - z) * s or q * s + z."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Int
from qcore.kernels.order import columns_by_group
from qcore.kernels.scales import by_group, group_size
from qcore.kernels.triton.linear import PlanesLinear, rows_of
from qcore.kernels.triton.product import Form, programs_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors


class IntegerLinear(PlanesLinear):
    """Whole numbers are multiplied; zero points in int16 are subtracted first, floating ones added to the scaled sums."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight, form = layer.weight, _form(layer.weight.scheme)
        grid, rows = weight.scheme.weight.granularity, weight.shape[0]
        zeros = weight.zeros if weight.zeros is None or form.zero == "added" else weight.zeros.to(torch.int16)
        flip = form.center if form.bits == 8 else 0  # signed ones are held as they are
        return cls(
            form,
            (codes ^ flip for codes in rows_of(weight)),
            by_group(weight.scales[0], grid, rows),
            zeros=None if zeros is None else by_group(zeros, grid, rows),
            order=None
            if weight.index is None
            else columns_by_group(weight.index, form.group, "integers in Triton").to(torch.int32),
        )

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        form, floats = _form(scheme), getattr(torch, dtype)
        zeros = {"": None, "stored": torch.int16, "added": floats}[form.zero]
        return programs_of(form, str(scheme), floats, None, zeros, dtype, target)


def _form(scheme: Scheme) -> Form:
    weight = scheme.weight
    assert isinstance(weight.element, Int)
    center = 1 << (weight.bits - 1) if weight.element.signed else 0
    zero = {None: "", "stored": "stored", "float": "added"}[weight.zero]
    return Form(weight.bits, group_size(weight.granularity), center, zero=zero, ordered=weight.ordered)
