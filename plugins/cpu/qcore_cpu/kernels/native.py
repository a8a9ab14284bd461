"""Linear layers on the native kernels: one packed block of bytes, one operator."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from qcore.elements import Block, Float, Group, Int, PerTensor, PerToken, Tile
from qcore.kernels.activations import quantize_input
from qcore_cpu.packed import (
    BLOCKS,
    EXACT,
    FLOAT_BLOCKS,
    FLOAT_STATIC,
    FLOAT_TOKEN,
    STATIC,
    TOKEN,
    header_of,
    input_of,
    lay_out,
)
from qcore_cpu.packed_blocks import block_parts_of
from qcore_cpu.packed_elements import element_parts

if TYPE_CHECKING:
    from qcore.scheme import TensorScheme
    from qcore.tensor import LayerTensors, QuantizedTensor

_BLOCK = 128
"""Activations under one scale where kernels round them, at most (native/linear.cpp)."""


class NativeLinear(torch.nn.Module):
    """y = x W^T in float32, whatever the activations' type; only the result is rounded to it.

    Inputs that the scheme rounds to int8, symmetrically by token or by a stored scale, are multiplied as whole numbers; those that it rounds to
    e4m3 by token, by 128 columns or by a stored scale are rounded by the kernels too. Any other input scheme is applied before the product.
    """

    packed: torch.Tensor
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None

    def __init__(self, layer: LayerTensors, input_kind: int) -> None:
        super().__init__()
        given = layer.weight.scheme.input
        self.rows = layer.weight.shape[0]
        self.given = given if input_kind == EXACT else None
        self.order = layer.order
        shared = NativeEmbedding.shared(layer.weight) if layer.input_scale is None else None
        if shared is not None:
            input_of(shared).fill_(input_kind)
        self.register_buffer("packed", pack(layer, input_kind) if shared is None else shared)
        self.register_buffer("input_scale", layer.input_scale if self.given else None)
        self.register_buffer("input_zero", layer.input_zero if self.given else None)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> NativeLinear:
        return cls(layer, _input_kind(layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.given is not None:
            wide = quantize_input(x.to(torch.float32), self.given, self.input_scale, self.input_zero, self.order)
            return self._product(wide).to(x.dtype)
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.qcore_cpu.linear(_with_regular_rows(x), self.packed, self.rows)
        return out


class NativeLinearInt8(NativeLinear):
    """The same with activations rounded to int8 where the scheme leaves them whole: a scale for each group of the weight, or for each 128 of its
    columns."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> NativeLinearInt8:
        return cls(layer, BLOCKS)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., K]: what x [..., K] stands for once it is rounded. Runs of columns are those of the packed order."""
        header, columns = header_of(self.packed), x.shape[-1]
        divided = header.group > _BLOCK and (header.groups == 1 or header.group % _BLOCK == 0)
        size = _BLOCK if divided else header.group
        order = torch.arange(columns)
        if header.order:
            order = self.packed[header.order : header.order + 4 * columns].view(torch.int32).long()
        values = x.to(torch.float32)[..., order]
        blocks = torch.nn.functional.pad(values, (0, -columns % size)).unflatten(-1, (-1, size))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        stands_for = ((blocks / scale).clamp(-128, 127).round() * scale).flatten(-2)[..., :columns]
        return torch.empty_like(values).index_copy_(-1, order, stands_for)


class NativeEmbedding(torch.nn.Module):
    """Rows of a packed weight; only those that are looked up become numbers. A linear layer tied to it, which is made of the same weight, shares
    what is packed: an embedding does not look at its input's kind."""

    packed: torch.Tensor
    last: tuple[weakref.ref[QuantizedTensor], weakref.ref[torch.Tensor]] | None = None
    """The weight that was packed last, and what became of it."""

    def __init__(self, layer: LayerTensors, dtype: torch.dtype) -> None:
        super().__init__()
        self.columns, self.dtype = layer.weight.shape[1], dtype
        self.register_buffer("packed", pack(layer, EXACT))
        NativeEmbedding.last = weakref.ref(layer.weight), weakref.ref(self.packed)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> NativeEmbedding:
        return cls(layer, dtype)

    @classmethod
    def shared(cls, weight: QuantizedTensor) -> torch.Tensor | None:
        """What the last embedding has packed, once, if it is of this weight."""
        last, NativeEmbedding.last = cls.last, None
        return last[1]() if last is not None and last[0]() is weight else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = torch.ops.qcore_cpu.look_up(tokens.long().contiguous(), self.packed, self.columns)
        return rows.to(self.dtype)


def pack(layer: LayerTensors, input_kind: int) -> torch.Tensor:
    """uint8 [bytes]: the layer's weight for torch.ops.qcore_cpu.linear. Raises Refused (shape-unsupported,
    contents-unsupported) where its contents are none that the kernels read."""
    weight = layer.weight
    parts = block_parts_of(weight) if isinstance(weight.scheme.weight.element, Block) else element_parts(weight)
    parts.header.input = input_kind
    if layer.input_scale is not None:
        parts.header.input_scale = float(layer.input_scale.to(torch.float32))
    return lay_out(parts)


def _input_kind(layer: LayerTensors) -> int:
    """How the kernels treat the input; `EXACT` too where it is rounded before they get it."""
    given, element = layer.weight.scheme.input, layer.weight.scheme.weight.element
    if given is None or not _plain(given) or layer.order != "dequantized":
        return EXACT
    token = given.dynamic and isinstance(given.granularity, PerToken)
    static = not given.dynamic and isinstance(given.granularity, PerTensor)
    if given.element == Int(8, signed=True) and isinstance(element, Int):
        return TOKEN if token else STATIC if static else EXACT
    if given.element == Float("e4m3fn") and isinstance(element, Float):
        blocks = given.dynamic and given.granularity == Group(_BLOCK) and _within_blocks(layer)
        return FLOAT_TOKEN if token else FLOAT_STATIC if static else FLOAT_BLOCKS if blocks else EXACT
    return EXACT


def _plain(given: TensorScheme) -> bool:
    return (
        given.zero is None
        and given.outliers is None
        and given.bound is None
        and [level.type for level in given.scales] == ["float"]
    )


def _within_blocks(layer: LayerTensors) -> bool:
    """Whether groups of the weight's columns and blocks of the input's begin together."""
    grid = layer.weight.scheme.weight.scales[0].granularity
    size = grid.size if isinstance(grid, Group) else grid.cols if isinstance(grid, Tile) else _BLOCK
    return size % _BLOCK == 0 or _BLOCK % size == 0


def _with_regular_rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows are not contiguous at one distance."""
    if x.is_contiguous():
        return x
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.contiguous()
