"""8-bit weights with a scale for each output channel. Codes are held in 8 bits and become the activations' type at every call, which loses nothing; the scales follow
the sums.

Neuron's matrix engine multiplies no integers (AWS's documentation of neuronx-cc's error NCC_EVRF035), and torch's product of 8-bit floats has a result
of 8 bits: so int8 and fp8 are what weights are stored in, here as in AWS's own neuronx-distributed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.kernels.eight_bits import EightBits
from qcore_neuron.kernels.e4m3 import halved
from qcore_neuron.kernels.rounding import fp8_codes, int8_codes

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors


class WeightOnlyLinear(EightBits):
    """int8, e4m3 or e5m2 weights. In e4m3, rows with codes above 240 are held as halves."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        packed = super().from_layer(layer, dtype)
        if packed.codes.dtype == torch.float8_e4m3fn:
            packed.codes, factors = halved(packed.codes, 1, packed.codes.shape[1])
            packed.scales = packed.scales * factors.flatten()
        return packed

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return (self.sums(x).to(torch.float32) * self.scales).to(x.dtype)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] by the codes: [M, N] in x's type."""
        return torch.matmul(x, self.codes.to(x.dtype).t())


class Int8ProductLinear(WeightOnlyLinear):
    """Inputs are rounded to int8 as the scheme says. Codes of both sides are whole numbers up to 128, which bfloat16 has all of."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = int8_codes(x, self.input_scale)
        return (self.sums(codes.to(x.dtype)).to(torch.float32) * self.scales * scale).to(x.dtype)


class Fp8ProductLinear(WeightOnlyLinear):
    """Inputs are rounded to numbers of e4m3 as the scheme says, all of which both types of activations have."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = fp8_codes(x, self.input_scale)
        return (self.sums(codes.to(x.dtype)).to(torch.float32) * self.scales * scale).to(x.dtype)
