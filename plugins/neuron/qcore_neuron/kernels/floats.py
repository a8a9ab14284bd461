"""Small floats of 4 to 8 bits as bytes: each is taken apart into sign, exponent and mantissa by arithmetic, which needs no 8-bit float of the chip's and has all of a
format's numbers. Scales of groups and tiles, MX's and NVFP4's among them, are multiplied in at every call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Float, Tile
from qcore.kernels.scales import by_group, finest_scales
from qcore_neuron.kernels.inputs import rounded_values
from qcore_neuron.kernels.planes import from_planes, to_planes
from qcore_neuron.kernels.rounding import at_least

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import TensorScheme
    from qcore.tensor import LayerTensors


class FloatLinear(torch.nn.Module):
    """codes: planes of bits, uint8 [N, K bits / 8]. scales: float32 [N / rows, groups], each of a tile that is `rows` high."""

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, input_scale: torch.Tensor | None, name: str, bits: int, given: TensorScheme | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.bits, self.given = name, bits, given
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        scheme, (rows, columns) = weight.scheme, weight.shape
        element, grid = scheme.weight.element, scheme.weight.granularity
        assert isinstance(element, Float)
        codes = weight.codes.view(torch.uint8) if element.bits == 8 else to_planes(weight.codes, element.bits, columns)
        scales = finest_scales(weight)
        if not isinstance(grid, Tile):
            scales = by_group(scales, grid, rows).t()
        given = None if layer.input_scale is None else layer.input_scale.to(torch.float32)
        return cls(
            codes.contiguous(), scales.to(torch.float32).contiguous(), given, element.format, element.bits, scheme.input
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.given is None else rounded_values(x, self.given, self.input_scale).to(x.dtype)
        return torch.matmul(x, self.weight().to(x.dtype).t())

    def weight(self) -> torch.Tensor:
        """float32 [N, K]."""
        codes = self.codes.to(torch.float32) if self.bits == 8 else from_planes(self.codes, self.bits)
        high, wide = self.scales.shape
        tiles: torch.Tensor = numbers(codes, self.name).unflatten(1, (wide, -1)).unflatten(0, (high, -1))
        return (tiles * self.scales.unsqueeze(1).unsqueeze(-1)).flatten(2).flatten(0, 1)


_NO_NUMBERS = {"e4m3fn": 127.0, "e5m2": 125.0}
"""From which code on, but for the sign, there are none. Of e5m2, infinity is not known here: what is rounded to it saturates."""


def numbers(codes: torch.Tensor, name: str) -> torch.Tensor:
    """What whole float32 codes of a format stand for, exactly."""
    exponent_bits, mantissa_bits = int(name[1]), int(name[3])
    bias = 2 ** (exponent_bits - 1) - (0 if name.endswith("uz") else 1)
    sign = torch.floor(codes * 0.5 ** (exponent_bits + mantissa_bits))
    size = codes - sign * 2.0 ** (exponent_bits + mantissa_bits)
    exponent = torch.floor(size * 0.5**mantissa_bits)
    normal = exponent.clamp(max=1.0)
    mantissa = size - exponent * 2.0**mantissa_bits + normal * 2.0**mantissa_bits
    rest = exponent - normal
    found: torch.Tensor = mantissa * 2.0 ** (1 - bias - mantissa_bits)
    for place in range(exponent_bits - 1, -1, -1):
        bit = at_least(rest, 2.0**place)
        rest = rest - bit * 2.0**place
        found = found * (1.0 + bit * (float(2 ** (2**place)) - 1.0))
    found = found * (1.0 - 2.0 * sign)
    if name not in _NO_NUMBERS:
        return found
    return torch.where(size >= size.new_full((), _NO_NUMBERS[name]), size.new_full((), float("nan")), found)
