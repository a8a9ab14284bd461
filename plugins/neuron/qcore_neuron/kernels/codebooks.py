"""4-bit codebooks: each of the table's 16 numbers is chosen bit by bit, which takes 15 selections and no gather; scales in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.kernels.scales import by_group, finest_scales
from qcore_neuron.kernels.planes import from_planes, to_planes
from qcore_neuron.kernels.rounding import at_least

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors


class CodebookLinear(torch.nn.Module):
    """codes: planes of 4 bits, uint8 [N, K / 2]. scales: float32 [N, groups]. table: float32 [16]."""

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("table", table)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        assert weight.table is not None, "a codebook travels with its tensor"
        scales = by_group(finest_scales(weight), weight.scheme.weight.granularity, weight.shape[0]).t().contiguous()
        return cls(to_planes(weight.codes, 4, weight.shape[1]), scales, weight.table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight().to(x.dtype).t())

    def weight(self) -> torch.Tensor:
        """float32 [N, K]."""
        entries = choose(from_planes(self.codes, 4), self.table)
        grouped: torch.Tensor = entries.unflatten(1, (self.scales.shape[1], -1))
        return (grouped * self.scales.unsqueeze(-1)).flatten(1)


def choose(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entries of a table [16] for whole float32 codes: the highest bit leaves one of each two that are 8 apart, and so on."""
    rest, found = codes, list(table.unbind(0))
    for place in range(3, -1, -1):
        bit, half = at_least(rest, 2.0**place), 2**place
        rest, chosen = rest - bit * 2.0**place, bit.to(torch.bool)
        found = [torch.where(chosen, found[entry + half], found[entry]) for entry in range(half)]
    return found[0]
