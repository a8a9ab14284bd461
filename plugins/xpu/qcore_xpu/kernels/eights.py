"""8-bit weights: torch's weight-only `_weight_int8pack_mm`, and its products of 8-bit codes with inputs that are rounded as the scheme says: `_int_mm`
(int8, exact sums in int32) and `_scaled_mm` (e4m3, a scale for each row of both). All are oneDNN's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.kernels.activations import dynamic_fp8, dynamic_int8, static_fp8, static_int8

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors


class _EightBits(torch.nn.Module):
    """codes: [N, K]. scales: [N]; a scale for the whole tensor is repeated. input_scale: of static inputs."""

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, input_scale: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        scales = layer.weight.scales[0].to(torch.float32).flatten().expand(layer.weight.shape[0]).contiguous()
        return cls(layer.weight.codes, cls.stored(scales, dtype), layer.input_scale)

    @classmethod
    def stored(cls, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 [N], as the operator takes them."""
        return scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = self.product(flat) if len(flat) else x.new_empty(0, len(self.codes))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> [M, N] in x's dtype."""
        raise NotImplementedError


class Int8Linear(_EightBits):
    """Weight-only; scales in the activations' type."""

    @classmethod
    def stored(cls, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return scales.to(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x, self.codes, self.scales)


class Int8ProductLinear(_EightBits):
    """Both scales follow the exact sums in float32."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dynamic_int8(x) if self.input_scale is None else static_int8(x, self.input_scale)
        sums = torch._int_mm(codes, self.codes.t())
        return (sums.to(torch.float32) * self.scales * scale).to(x.dtype)


class Fp8ProductLinear(_EightBits):
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
