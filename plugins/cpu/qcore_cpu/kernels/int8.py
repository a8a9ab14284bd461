"""int8 weights: torch's weight-only `_weight_int8pack_mm`, and oneDNN's int8 x int8 product."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from qcore.kernels.activations import dynamic_int8, static_int8

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors


class Int8Linear(torch.nn.Module):
    """w = q * s with one scale for each output channel; activations stay in bfloat16."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Int8Linear:
        return cls(layer.weight.codes, _channel_scales(layer).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out: torch.Tensor = torch._weight_int8pack_mm(flat, self.codes, self.scales)
        return out.reshape(*x.shape[:-1], out.shape[-1])


class OnednnInt8Linear(torch.nn.Module):
    """Activations rounded to int8 a row (or by a stored scale), multiplied in int32, scaled in float32.

    oneDNN's fast path is unsigned times signed, so that codes q go in as q + 128 with a zero point of 128; with signed
    ones it ran 300 times slower on a CPU without AMX. Without VNNI it adds pairs of products in 16 bits, where they
    saturate: there each code is the sum of two that are half as large, whose products fit, and the answers are added.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    input_scale: torch.Tensor | None

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, input_scale: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> OnednnInt8Linear:
        packed = torch.ops.onednn.qlinear_prepack(layer.weight.codes, None)
        zeros = torch.zeros(layer.weight.shape[0], dtype=torch.int32)
        return cls(packed, _channel_scales(layer), zeros, layer.input_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        codes, scale = dynamic_int8(flat) if self.input_scale is None else static_int8(flat, self.input_scale)
        unsigned = codes.view(torch.uint8) ^ 0x80
        if saturates():
            half = unsigned >> 1
            out = self._product(half, 64) + self._product(unsigned - half, 64)
        else:
            out = self._product(unsigned, 128)
        return (out * scale).to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])

    def _product(self, codes: torch.Tensor, zero: int) -> torch.Tensor:
        return _qlinear(codes, zero, self.packed, self.scales, self.zeros)


def _qlinear(
    codes: torch.Tensor, zero: int, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """(codes - zero) times the weight and its scales: uint8 [M, K] -> float32 [M, N]."""
    out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


@cache
def saturates() -> bool:
    """Whether this host's oneDNN gives a wrong answer for the largest codes."""
    packed = torch.ops.onednn.qlinear_prepack(torch.full((32, 64), 127, dtype=torch.int8), None)
    codes = torch.full((1, 64), 255, dtype=torch.uint8)
    out = _qlinear(codes, 0, packed, torch.ones(32), torch.zeros(32, dtype=torch.int32))
    return not bool((out == 64 * 255 * 127).all())


def _channel_scales(layer: LayerTensors) -> torch.Tensor:
    """float32 [N]; a scale for the whole tensor is repeated."""
    return layer.weight.scales[0].to(torch.float32).flatten().expand(layer.weight.shape[0]).contiguous()
