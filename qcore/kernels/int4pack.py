"""What torch's weight-only int4 operators have in common, whatever the device.

They compute y = x W^T with w = (q - 8) * scale + zero for groups of 32, 64, 128 or 256 columns; q are codes of 0 to 15, and
scale and zero are in the activations' dtype. How codes are laid out is each device's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block, Group, Int
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors, QuantizedTensor

_ROWS = 256
"""Rows repacked at a time; a multiple of the row blocks of torch's layouts (64 on CPUs, 8 on GPUs)."""

Codes = Iterator[torch.Tensor]
"""int32 [_ROWS or what is left, K], one block of rows after the other, in memory that is used again."""


class Int4Pack(torch.nn.Module):
    """Groups in column order, or act-order columns sorted by group once and the input gathered at each call."""

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor
    order: torch.Tensor | None

    def __init__(
        self, packed: torch.Tensor, scales_and_zeros: torch.Tensor, group_size: int, order: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", scales_and_zeros)
        self.register_buffer("order", order)

    @classmethod
    def pack(cls, codes: torch.Tensor) -> torch.Tensor:
        """The operator's layout of int32 codes [rows, K]; blocks of rows follow each other in its first dimension."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The operator on contiguous x [M, K]."""
        raise NotImplementedError

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        if isinstance(weight.scheme.weight.element, Block):
            scale, zero = _block_scales(weight)
            packed = _packed(cls.pack, _block_codes(weight), weight.shape[0])
            return cls(packed, _interleave(scale, zero, dtype), 32)
        assert isinstance(weight.scheme.weight.scales[0].granularity, Group)
        group_size = weight.scheme.weight.scales[0].granularity.size
        order = None if weight.index is None else _sorted_by_group(weight.index, group_size)
        scale, zero = _scales(weight)
        packed = _packed(cls.pack, _codes(weight, order), weight.shape[0])
        return cls(packed, _interleave(scale, zero, dtype), group_size, order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if self.order is not None:
            flat = flat[:, self.order]
        out = self.product(flat)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _packed(pack: Callable[[torch.Tensor], torch.Tensor], blocks: Codes, rows: int) -> torch.Tensor:
    """The packed blocks, one after the other, in memory that is taken once."""
    whole, filled = None, 0
    for block in blocks:
        part = pack(block)
        if whole is None:
            whole = part.new_empty(len(part) * rows // len(block), *part.shape[1:])
        whole[filled : filled + len(part)] = part
        filled += len(part)
    assert whole is not None, "a weight has rows"
    return whole


# --- Integers --------------------------------------------------------------------------------------------------------


def _codes(weight: QuantizedTensor, order: torch.Tensor | None) -> Codes:
    rows, columns = weight.shape
    out = torch.empty(_ROWS, columns, dtype=torch.int32)
    for start in range(0, rows, _ROWS):
        bytes_ = weight.codes[start : start + _ROWS]
        part = out[: len(bytes_)]
        pairs = part.view(len(bytes_), -1, 2)
        torch.bitwise_and(bytes_, 15, out=pairs[..., 0])
        torch.bitwise_right_shift(bytes_, 4, out=pairs[..., 1])
        yield part if order is None else part[:, order]


def _scales(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsigned: (q - z) s = (q - 8) s + (8 - z) s. Signed codes are held as q + 8 already."""
    element, scale = weight.scheme.weight.element, weight.scales[0].to(torch.float32)
    middle = 0 if isinstance(element, Int) and element.signed else 8
    return scale, torch.zeros_like(scale) if weight.zeros is None else (middle - weight.zeros.to(torch.float32)) * scale


def _interleave(scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[groups, rows, 2], as the operators read them."""
    return torch.stack([scale.to(dtype).t(), zero.to(dtype).t()], -1).contiguous()


def _sorted_by_group(index: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns in the order of their groups."""
    counts = torch.bincount(index)
    if bool((counts != group_size).any()):
        raise Refused(
            Refusal("shape-unsupported", "notimpl", "torch's int4 operator", "act-order groups must all be of one size",
                    f"found groups of {int(counts.min())} to {int(counts.max())} columns, expected {group_size}",
                    "Another kernel takes this layer.")
        )  # fmt: skip
    return torch.argsort(index, stable=True)


# --- ggml's 4-bit affine blocks: q4_0, q4_1 and q4_k are groups of 32 with a scale and, but for q4_0, a minimum --------


def _blocks(weight: QuantizedTensor, start: int, stop: int) -> torch.Tensor:
    """uint8 [rows, blocks of a row, bytes of a block]"""
    kind = _kind(weight)
    block = BLOCK_TYPES[kind]
    return weight.codes[start:stop].reshape(-1, weight.shape[-1] // block.elements, block.nbytes)


def _kind(weight: QuantizedTensor) -> str:
    element = weight.scheme.weight.element
    assert isinstance(element, Block)
    return element.type


def _block_codes(weight: QuantizedTensor) -> Codes:
    """Runs of 32 bytes (q4_k) or 16 (the others): their low nibbles first, then the high ones."""
    kind, (rows, columns) = _kind(weight), weight.shape
    run, bytes_of_codes = 32 if kind == "q4_k" else 16, BLOCK_TYPES[kind].elements // 2
    out = torch.empty(_ROWS, columns, dtype=torch.int32)
    for start in range(0, rows, _ROWS):
        blocks = _blocks(weight, start, start + _ROWS)
        quants = blocks[..., -bytes_of_codes:].reshape(len(blocks), -1, run)
        part = out[: len(blocks)]
        halves = part.view(len(blocks), -1, 2, run)
        torch.bitwise_and(quants, 15, out=halves[..., 0, :])
        torch.bitwise_right_shift(quants, 4, out=halves[..., 1, :])
        yield part


def _block_scales(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    read = {"q4_0": _read_q4_0, "q4_1": _read_q4_1, "q4_k": _read_q4_k}[_kind(weight)]
    rows, columns = weight.shape
    parts = [read(_blocks(weight, start, start + _ROWS)) for start in range(0, rows, _ROWS)]
    scale, zero = (torch.cat(part).reshape(rows, columns // 32) for part in zip(*parts, strict=True))
    return scale, zero


def _read_q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _halves(blocks, 0)
    return scale, torch.zeros_like(scale)


def _read_q4_1(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale, minimum = _halves(blocks, 0), _halves(blocks, 2)
    return scale, minimum + 8 * scale


def _read_q4_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight 6-bit scales and minima a block (ggml's get_scale_min_k4)."""
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], -1)
    minima = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], -1)
    scale = _halves(blocks, 0).unsqueeze(-1) * scales
    return scale, 8 * scale - _halves(blocks, 2).unsqueeze(-1) * minima


def _halves(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """float32 of the float16 at `offset` of every block."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).squeeze(-1).to(torch.float32)
