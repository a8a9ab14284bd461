"""LLM.int8: int8 weights by channel; input columns with outliers stay in 16 bits, the others are rounded to int8 at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore_neuron.kernels.eight_bits import WeightOnlyLinear
from qcore_neuron.kernels.inputs import rounded_values

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import TensorScheme
    from qcore.tensor import LayerTensors


class LlmInt8Linear(WeightOnlyLinear):
    """Kept and rounded columns meet the same codes, in one product of static shape."""

    given: TensorScheme | None

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        packed = super().from_layer(layer, dtype)
        packed.given = layer.weight.scheme.input
        return packed

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return super().product(rounded_values(x, self.given, None).to(x.dtype))
