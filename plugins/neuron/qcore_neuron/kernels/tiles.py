"""e4m3 weights whose scales belong to groups or tiles: w = q * s in float32 at every call, and torch's product in the activations' type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Group, Tile
from qcore.kernels.scales import finest_scales
from qcore_neuron.kernels.e4m3 import halved
from qcore_neuron.kernels.inputs import rounded_values

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import TensorScheme
    from qcore.tensor import LayerTensors


class Fp8TileLinear(torch.nn.Module):
    """codes: e4m3 [N, K], up to 240 (qcore_neuron.kernels.e4m3). scales: float32 [N / rows, K / columns]. Inputs stay, or are rounded by row or by group."""

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, input_scale: torch.Tensor | None, given: TensorScheme | None
    ) -> None:
        super().__init__()
        self.given = given
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        grid = weight.scheme.weight.granularity
        assert isinstance(grid, Group | Tile)
        rows, columns = (grid.rows, grid.cols) if isinstance(grid, Tile) else (1, grid.size)
        codes, factors = halved(weight.codes, rows, columns)
        given = None if layer.input_scale is None else layer.input_scale.to(torch.float32)
        return cls(codes, finest_scales(weight) * factors, given, weight.scheme.input)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.given is not None:
            x = rounded_values(x, self.given, self.input_scale).to(x.dtype)
        return torch.matmul(x, self.weight().to(x.dtype).t())

    def weight(self) -> torch.Tensor:
        """float32 [N, K]."""
        high, wide = self.scales.shape
        tiles: torch.Tensor = self.codes.to(torch.float32).unflatten(1, (wide, -1)).unflatten(0, (high, -1))
        return (tiles * self.scales.unsqueeze(1).unsqueeze(-1)).flatten(2).flatten(0, 1)
