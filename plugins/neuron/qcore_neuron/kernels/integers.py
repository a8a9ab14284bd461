"""Integer weights of 1 to 8 bits by groups, channel or tensor: w = (q - z) * s in float32 at every call, and torch's product in the activations' type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Group, Int
from qcore.kernels.order import columns_by_group
from qcore.kernels.scales import by_group
from qcore_neuron.kernels.inputs import rounded_values
from qcore_neuron.kernels.planes import from_planes, to_planes

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import TensorScheme
    from qcore.tensor import LayerTensors


class IntegerLinear(torch.nn.Module):
    """codes: planes of bits (qcore_neuron.kernels.planes), uint8 [N, K bits / 8]; int8 or uint8 [N, K] of 8 bits. scales: [N, groups], floats as in the file. zeros: alike, in
    codes, or floats that are added (`added`). order: int32 [K], act-order columns sorted by group. middle: how much higher signed codes are held."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor | None, bits: int, middle: int, added: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.bits, self.middle, self.added = bits, middle, added
        for name, part in {"codes": codes, "scales": scales, "zeros": zeros, "order": order}.items():
            self.register_buffer(name, part)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight, order = layer.weight, None
        scheme, (rows, columns) = weight.scheme.weight, weight.shape
        element, grid = scheme.element, scheme.granularity
        assert isinstance(element, Int)
        if weight.index is not None:
            assert isinstance(grid, Group)
            order = columns_by_group(weight.index, grid.size, "Neuron's product by groups")
        if element.bits < 8:
            codes = to_planes(weight.codes, element.bits, columns, order)
        else:
            codes = weight.codes.contiguous() if order is None else weight.codes[:, order].contiguous()
        scales, zeros = (
            None if part is None else by_group(part, grid, rows).t().contiguous() for part in (weight.scales[0], weight.zeros)
        )  # fmt: skip
        assert scales is not None
        middle = 1 << (element.bits - 1) if element.signed and element.bits < 8 else 0
        order = None if order is None else order.to(torch.int32)
        return cls(codes, scales, zeros, order, element.bits, middle, scheme.zero == "float")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.order is None else x.index_select(-1, self.order)
        return torch.matmul(x, self.weight(self.codes, self.scales, self.zeros).to(x.dtype).t())

    def weight(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """float32 [rows, K] of some rows' parts, columns in the packed order."""
        values = codes.to(torch.float32) if self.bits == 8 else from_planes(codes, self.bits)
        grouped: torch.Tensor = values.unflatten(1, (scales.shape[1], -1))
        scales = scales.to(torch.float32).unsqueeze(-1)
        if zeros is not None:
            zeros = zeros.to(torch.float32).unsqueeze(-1)
        if self.middle:
            grouped = grouped - float(self.middle)
        if zeros is not None and not self.added:
            grouped = grouped - zeros
        grouped = grouped * scales
        if zeros is not None and self.added:
            grouped = grouped + zeros
        return grouped.flatten(1)


class RoundedIntegerLinear(IntegerLinear):
    """Inputs are rounded as the scheme says, and what they stand for is multiplied. input_scale, input_zero: float32 [1], of static inputs."""

    given: TensorScheme | None
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        packed = super().from_layer(layer, dtype)
        packed.given = layer.weight.scheme.input
        for name, part in (("input_scale", layer.input_scale), ("input_zero", layer.input_zero)):
            packed.register_buffer(name, None if part is None else part.to(torch.float32))
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(rounded_values(x, self.given, self.input_scale, self.input_zero).to(x.dtype))


class IntegerEmbedding(IntegerLinear):
    """Only the rows that are looked up are taken apart. Their number is that of the tokens, whichever they are: shapes stay static."""

    dtype: torch.dtype

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        packed = super().from_layer(layer, dtype)
        packed.dtype = dtype
        return packed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        flat = tokens.to(torch.int32).reshape(-1)
        parts = [None if part is None else part.index_select(0, flat) for part in (self.codes, self.scales, self.zeros)]
        assert parts[0] is not None and parts[1] is not None
        rows = self.weight(parts[0], parts[1], parts[2]).to(self.dtype)
        return rows.reshape(*tokens.shape, rows.shape[1])
