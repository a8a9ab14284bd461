"""Weights whose inputs are 8 bits, too: they are rounded within the product, as they are multiplied."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qcore.elements import Float, Group, Int, PerToken
from qcore_tpu.kernels.form import Form, Rounding
from qcore_tpu.kernels.linear import FloatLinear, IntegerLinear, PlanesLinear

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import Scheme, TensorScheme
    from qcore.tensor import LayerTensors


class RoundedLinear(PlanesLinear):
    """Before a family of weights: its form with how inputs are rounded, and the scale of static ones."""

    @classmethod
    def form_of(cls, scheme: Scheme, columns: int) -> Form:
        return replace(super().form_of(scheme, columns), rounding=rounding_of(scheme.input))

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        made = super().from_layer(layer, dtype)
        if layer.input_scale is not None:
            made.input_scale = layer.input_scale.to(torch.float32).view(1, 1)
        return made


class RoundedIntegerLinear(RoundedLinear, IntegerLinear):
    """Integers of 1 to 8 bits x int8, symmetric both: sums of a group, or of a row, are whole numbers."""


class RoundedFloatLinear(RoundedLinear, FloatLinear):
    """e4m3 x e4m3, with a scale for each row of both, or for groups of columns of both."""


def rounding_of(scheme: TensorScheme | None) -> Rounding:
    """Of an input's scheme that a row takes."""
    assert scheme is not None and isinstance(scheme.element, Int | Float)
    element = "int8" if isinstance(scheme.element, Int) else scheme.element.format
    grid, scale = scheme.granularity, scheme.scales[0].type
    assert isinstance(grid, PerToken | Group) or not scheme.dynamic, "one scale for all rows is stored"
    return Rounding(element, scheme.dynamic, grid.size if isinstance(grid, Group) else 0, scale, scheme.outliers)
