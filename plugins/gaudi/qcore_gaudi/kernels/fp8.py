"""e4m3 weights with a scale for each output channel: the product of e4m3 and e4m3 (`fp8_gemm_v2`), and for inputs that stay in 16 bits `cast_from_fp8` and
torch's product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.kernels.eight_bits import EightBits
from qcore_gaudi.kernels.e4m3 import halved_rows, rounded

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors


class Fp8Codes(EightBits):
    """Codes up to 240."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        packed = super().from_layer(layer, dtype)
        packed.codes, packed.scales = halved_rows(packed.codes, packed.scales)
        return packed


class Fp8ProductLinear(Fp8Codes):
    """Inputs are rounded as the scheme says; both scales follow sums in float32."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = rounded(x, self.input_scale)
        out: torch.Tensor = torch.ops.hpu.fp8_gemm_v2(
            codes, False, self.codes, True, None, x.dtype, scale, self.scales, None, False
        )
        return out


class Fp8Linear(Fp8Codes):
    """Weight-only. Codes become bfloat16 as they are, which loses nothing; the scales follow the sums."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = torch.ops.hpu.cast_from_fp8(self.codes, None, x.dtype)
        return (torch.matmul(x, weight.t()).to(torch.float32) * self.scales).to(x.dtype)
