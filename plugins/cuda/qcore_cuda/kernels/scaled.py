"""8-bit weights times 8-bit inputs on tensor cores: torch's `_int_mm` (int8, exact sums in int32) and `_scaled_mm` (fp8).

Both are cuBLASLt. Inputs are rounded as the scheme says, by qcore.kernels.activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.kernels.activations import dynamic_fp8, dynamic_int8, static_fp8, static_int8

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors

_LEAST_ROWS = 17
"""`_int_mm` takes more than 16 rows of inputs on a GPU."""


class _ScaledLinear(torch.nn.Module):
    """Codes [N, K] with a float32 scale [N] for each output channel."""

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
        """A scale for the whole tensor is repeated."""
        scales = layer.weight.scales[0].to(torch.float32).flatten().expand(layer.weight.shape[0]).contiguous()
        return cls(layer.weight.codes, scales, layer.input_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = self.product(flat) if len(flat) else x.new_empty(0, len(self.codes))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> [M, N] in x's dtype."""
        raise NotImplementedError


class Int8Linear(_ScaledLinear):
    """Sums are exact; both scales follow in float32."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dynamic_int8(x) if self.input_scale is None else static_int8(x, self.input_scale)
        padding = max(0, _LEAST_ROWS - len(x))
        sums = torch._int_mm(torch.nn.functional.pad(codes, (0, 0, 0, padding)), self.codes.t())[: len(x)]
        return (sums.to(torch.float32) * self.scales * scale).to(x.dtype)


class Fp8Linear(_ScaledLinear):
    """Sums in float32, without the fast accumulation that keeps 14 bits of them."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dynamic_fp8(x) if self.input_scale is None else static_fp8(x, self.input_scale)
        return torch._scaled_mm(
            codes,
            self.codes.t(),
            scale_a=scale.expand(len(x), 1).contiguous(),
            scale_b=self.scales[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
