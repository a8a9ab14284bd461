"""8-bit weights: torch's weight-only `_weight_int8pack_mm`, and its products of 8-bit codes with inputs that are rounded as the scheme says: `_int_mm`
(int8, exact sums in int32) and `_scaled_mm` (e4m3, a scale for each row of both). All are oneDNN's."""

from __future__ import annotations

import torch

from qcore.kernels.activations import dynamic_fp8, dynamic_int8, static_fp8, static_int8
from qcore.kernels.eight_bits import EightBits


class Int8Linear(EightBits):
    """Weight-only; scales in the activations' type."""

    @classmethod
    def stored(cls, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return scales.to(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scales)


class Int8ProductLinear(EightBits):
    """Both scales follow the exact sums in float32."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dynamic_int8(x) if self.input_scale is None else static_int8(x, self.input_scale)
        sums = torch._int_mm(codes, self.codes.t())
        return (sums.to(torch.float32) * self.scales * scale).to(x.dtype)


class Fp8ProductLinear(EightBits):
    """Sums in float32."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dynamic_fp8(x) if self.input_scale is None else static_fp8(x, self.input_scale)
        return torch._scaled_mm(
            codes,
            self.codes.t(),
            scale_a=scale.expand(len(x), 1).contiguous(),
            scale_b=self.scales[None],
            out_dtype=x.dtype,
            use_fast_accum=False,
        )
