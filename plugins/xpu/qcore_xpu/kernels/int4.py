"""Weight-only int4 through torch's `_weight_int4pack_mm_with_scales_and_zeros` (oneDNN): w = (q - z) * s."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.bits import pack, unpack
from qcore.elements import Group, Int
from qcore.kernels.order import columns_by_group

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors

_ROWS = 256
"""Rows repacked at a time."""


class Int4Linear(torch.nn.Module):
    """packed: int32 [N, K / 8], the first of eight columns lowest. scales: [K / group, N], in the activations' dtype. zeros: int8, alike. order: int64
    [K], act-order columns sorted by group."""

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor | None, group: int
    ) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        element, grid = weight.scheme.weight.element, weight.scheme.weight.granularity
        assert isinstance(element, Int) and isinstance(grid, Group)
        codes, order = weight.codes, None
        if weight.index is not None:
            order = columns_by_group(weight.index, grid.size, "torch's int4 operator")
            sorted_ = (unpack(part, 4, weight.shape[1])[:, order] for part in codes.split(_ROWS))
            codes = torch.cat([pack(part, 4) for part in sorted_])
        scales = weight.scales[0].to(dtype).t().contiguous()
        if weight.zeros is None:
            zeros = torch.full_like(scales, 8 if element.signed else 0, dtype=torch.int8)
        else:  # signed codes are held eight higher, and so are their zero points here
            zeros = (weight.zeros + (8 if element.signed else 0)).to(torch.int8).t().contiguous()
        return cls(codes.contiguous().view(torch.int32), scales, zeros, order, grid.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat.contiguous() if self.order is None else flat[:, self.order]
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(
            flat, self.packed, self.group, self.scales, self.zeros
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])
