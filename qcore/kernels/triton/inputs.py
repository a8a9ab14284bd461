"""Weights under inputs that are quantized too, where the matrix unit has no product for both: inputs are rounded as the scheme says, and what they then
stand for is multiplied in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qcore.elements import Float, Group, PerToken
from qcore.kernels.activations import quantize_input
from qcore.kernels.stacking import StackableLinear
from qcore.kernels.triton.floats import FloatLinear
from qcore.kernels.triton.integers import IntegerLinear
from qcore.kernels.triton.rounding import Rounding, round_input

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors


class RoundedLinear(StackableLinear):
    """weight: an IntegerLinear or FloatLinear. input_scale, input_zero: of the layer, [1]. What no kernel here rounds, torch's operators do."""

    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None

    def __init__(self, weight: IntegerLinear | FloatLinear, layer: LayerTensors) -> None:
        super().__init__()
        self.weight, self.order = weight, layer.order
        given = layer.weight.scheme.input
        assert given is not None
        self.given, self.rounding = given, Rounding.of(given, layer.order)
        self.register_buffer("input_scale", None if layer.input_scale is None else layer.input_scale.to(torch.float32))
        self.register_buffer("input_zero", layer.input_zero)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        return cls(_family(layer.weight.scheme).from_layer(layer, dtype), layer)

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        rounding = Rounding.of(scheme.input)
        return [
            *_family(scheme).programs(scheme, dtype, target),
            *(rounding.programs(False, dtype) if rounding else []),
        ]

    @classmethod
    def stackable(cls, layers: Sequence[Self]) -> bool:
        """Not where how a row is rounded depends on other rows: each expert has others."""
        return layers[0]._rounds_by_row() and super().stackable(layers)

    def _rounds_by_row(self) -> bool:
        given, static = self.given, self.input_scale is not None
        if given.outliers is not None or self.order == "inverses":
            return False
        if given.scales[0].type == "e4m3fn":  # under a scale of the whole input, or the file's
            return static and self.rounding is not None
        return static or isinstance(given.granularity, PerToken | Group)

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.weight(self.rounded(x, experts), experts)
        return out

    def rounded(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """[..., K] in x's type: what x stands for once it is rounded."""
        how, scale, zero = self.rounding, self.input_scale, self.input_zero
        if experts is not None:
            scale, zero = (None if part is None else part[experts] for part in (scale, zero))
        if how is None or (how.scale == "e4m3fn" and scale is None):
            return quantize_input(x, self.given, scale, zero, self.order)
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        stands_for: torch.Tensor = round_input(
            flat, scale, how.element, how.group, how.scale, how.dynamic, how.bound, False
        )[0]
        return stands_for.reshape(x.shape)


def _family(scheme: Scheme) -> type[IntegerLinear | FloatLinear]:
    return FloatLinear if isinstance(scheme.weight.element, Float) else IntegerLinear
