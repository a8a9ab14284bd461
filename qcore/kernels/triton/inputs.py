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
from qcore.kernels.triton.whole import given_scale, scale_of

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
        self.given, self.rounding = given, Rounding.of(given_scale(given) or given, layer.order)
        self.register_buffer("input_scale", None if layer.input_scale is None else layer.input_scale.to(torch.float32))
        self.register_buffer("input_zero", layer.input_zero)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        return cls(_family(layer.weight.scheme).from_layer(layer, dtype), layer)

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        given = scheme.input
        rounding = Rounding.of(given and (given_scale(given) or given))
        return [
            *_family(scheme).programs(scheme, dtype, target),
            *(rounding.programs(False, dtype) if rounding else []),
        ]

    @classmethod
    def stackable(cls, layers: Sequence[Self]) -> bool:
        """Not where torch's operators round an expert's row by what is in others."""
        return layers[0]._rounds_apart() and super().stackable(layers)

    def _rounds_apart(self) -> bool:
        """Whether rows of several experts can be rounded at once."""
        given = self.given
        if self.rounding is not None:
            return True
        if given.outliers is not None or self.order == "inverses" or given.scales[0].type == "e4m3fn":
            return False
        return self.input_scale is not None or isinstance(given.granularity, PerToken | Group)

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.weight(self.rounded(x, experts), experts)
        return out

    def rounded(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """[..., K] in x's type: what x stands for once it is rounded."""
        how, scale, zero = self.rounding, self.input_scale, self.input_zero
        if experts is not None:
            scale, zero = (None if part is None else part[experts] for part in (scale, zero))
        if how is None:
            return quantize_input(x, self.given, scale, zero, self.order)
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        if scale is None and given_scale(self.given):
            scale = scale_of(flat, self.given, experts, len(self.weight.codes))
        stands_for: torch.Tensor = round_input(
            flat, scale, how.element, how.group, how.scale, how.dynamic, how.bound, False
        )[0]
        return stands_for.reshape(x.shape)


def _family(scheme: Scheme) -> type[IntegerLinear | FloatLinear]:
    return FloatLinear if isinstance(scheme.weight.element, Float) else IntegerLinear
