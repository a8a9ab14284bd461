"""Layers of 8-bit codes with a scale for each output channel: what a vendor's operators for them have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors


class EightBits(torch.nn.Module):
    """codes: 8 bits each, [N, K]. scales: [N], of all output channels. input_scale: of static inputs, float32 [1]."""

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
        weight, given = layer.weight, layer.input_scale
        scales = weight.scales[0].to(torch.float32).flatten().expand(weight.shape[0]).contiguous()
        given = None if given is None else given.to(torch.float32)
        return cls(weight.codes.contiguous(), cls.stored(scales, dtype), given)

    @classmethod
    def stored(cls, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 [N], as the operator takes them beside activations in dtype."""
        return scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        out = self.product(flat) if len(flat) else x.new_empty(0, len(self.codes))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K], of one row at least and of unit stride along K -> [M, N] in x's dtype."""
        raise NotImplementedError
