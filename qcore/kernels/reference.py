"""The reference kernels: the definition, run as it stands. Any scheme, any torch device."""

from __future__ import annotations

import torch

from qcore.elements import Tile
from qcore.kernels import integer_product
from qcore.kernels.activations import quantize_input
from qcore.kernels.llm_int8 import by_channel, product
from qcore.tensor import LayerTensors, QuantizedTensor

_BLOCK_ELEMENTS = 1 << 20
"""Weights dequantized at a time: 4 MiB of float32, which stays in a core's cache."""


class PackedWeight(torch.nn.Module):
    """Holds a QuantizedTensor's parts as buffers, in the canonical layout."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.scheme, self.shape, self.first_row = weight.scheme, weight.shape, weight.first_row
        self.coarse_first = weight.coarse_first
        self.levels = len(weight.scales)
        parts = {"codes": weight.codes, "zeros": weight.zeros, "index": weight.index, "table": weight.table}
        parts |= {"scale_table": weight.scale_table, "offset": weight.offset}
        parts |= {f"scale{level}": scale for level, scale in enumerate(weight.scales)}
        for name, part in parts.items():
            self.register_buffer(name, part)

    @property
    def weight(self) -> QuantizedTensor:
        """The same tensor again, on the module's device."""
        parts = dict(self.named_buffers())
        scales = tuple(parts[f"scale{level}"] for level in range(self.levels))
        names = ("zeros", "index", "table", "scale_table", "offset")
        rest = {name: parts.get(name) for name in names}
        return QuantizedTensor(self.scheme, self.shape, parts["codes"], scales, first_row=self.first_row,
                               coarse_first=self.coarse_first, **rest)  # fmt: skip


class ReferenceLinear(PackedWeight):
    """y = x W^T with W dequantized a block of rows at a time; activations are quantized where the scheme says so."""

    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None

    def __init__(self, layer: LayerTensors) -> None:
        super().__init__(layer.weight)
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("input_zero", layer.input_zero)
        self.order = layer.order

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> ReferenceLinear:
        return cls(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, given = self.weight, self.scheme.input
        if given is not None and given.outliers is not None and x.numel() and by_channel(weight):
            return product(x, weight, given.outliers)
        if self.order == "integers" and x.numel() and integer_product.takes(self.scheme):
            return integer_product.product(x, weight, self.input_scale, self.input_zero)
        if weight.scheme.input is not None:
            x = quantize_input(x, weight.scheme.input, self.input_scale, self.input_zero, self.order)
        rows, columns = weight.shape
        step = _row_step(weight, max(1, _BLOCK_ELEMENTS // columns))
        out = x.new_empty(*x.shape[:-1], rows)
        for start in range(0, rows, step):
            block = weight.rows(start, start + step).dequantize(x.dtype)
            out[..., start : start + step] = torch.nn.functional.linear(x, block)
        return out


class ReferenceEmbedding(PackedWeight):
    """Dequantizes only the rows that are looked up."""

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> ReferenceEmbedding:
        return cls(layer.weight, dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        wanted, places = torch.unique(tokens, return_inverse=True)
        return self.weight.take(wanted).dequantize(self.dtype)[places]


def _row_step(weight: QuantizedTensor, rows: int) -> int:
    """`rows`, rounded so that blocks begin where the scheme can be cut."""
    levels = weight.scheme.weight.scales
    tile = levels[0].granularity.rows if levels and isinstance(levels[0].granularity, Tile) else 1
    return max(tile, rows // tile * tile)
