"""Weight-only int4 through `convert_from_uint4`, w = (q - z) * s in bfloat16 at every call, and torch's product."""

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
    """packed: int32 [K, N / 8], the first of eight rows of the weight lowest. scales: [K / group, N], in the activations' dtype. zeros: int32
    [K / group, N / 8], packed alike; None for none. order: int64 [K], act-order columns sorted by group."""

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """A scale for each row is one group. Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight, order = layer.weight, None
        element, grid = weight.scheme.weight.element, weight.scheme.weight.granularity
        assert isinstance(element, Int)
        if weight.index is not None:
            assert isinstance(grid, Group)
            order = columns_by_group(weight.index, grid.size, "convert_from_uint4")
        parts = (unpack(part, 4, weight.shape[1]) for part in weight.codes.split(_ROWS))
        packed = torch.cat([pack(part.t() if order is None else part[:, order].t(), 4) for part in parts], 1)
        middle = 8 if element.signed else 0  # signed codes are held eight higher, and so are their zero points here
        scales = weight.scales[0].to(dtype).t().contiguous()
        zeros = None
        if weight.zeros is not None:
            zeros = pack((weight.zeros + middle).t(), 4).contiguous().view(torch.int32)
        elif middle:
            zeros = pack(torch.full_like(scales, middle), 4).view(torch.int32)
        return cls(packed.contiguous().view(torch.int32), scales, zeros, order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = torch.ops.hpu.convert_from_uint4(self.packed, self.scales, self.zeros, x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        out = torch.mm(flat if self.order is None else flat.index_select(1, self.order), weight)
        return out.reshape(*x.shape[:-1], out.shape[-1])
