"""Weight-only int4 through torch's `_weight_int4pack_mm_for_cpu`.

The operator computes y = x W^T with w = (q - 8) * scale + zero for groups of 32, 64, 128 or 256 columns, with scale and
zero in the activations' dtype; only bfloat16 is vectorized (float32 and float16 ran 50 times slower when measured), so
that is what the rows in plugin.py claim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block, Group, Int
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

_ROWS = 256
"""Rows repacked at a time; a multiple of 64, the row block of torch's packed layout."""


class Int4Linear(torch.nn.Module):
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
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Int4Linear:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        scheme, (rows, columns) = weight.scheme.weight, weight.shape
        assert isinstance(scheme.element, Int) and isinstance(scheme.scales[0].granularity, Group)
        group_size = scheme.scales[0].granularity.size
        order = None if weight.index is None else _sorted_by_group(weight.index, group_size)

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            pairs, bytes_ = out.view(stop - start, -1, 2), weight.codes[start:stop]
            torch.bitwise_and(bytes_, 15, out=pairs[..., 0])
            torch.bitwise_right_shift(bytes_, 4, out=pairs[..., 1])
            if order is not None:
                out.copy_(out[:, order])

        scale = weight.scales[0].to(torch.float32)
        # Unsigned: (q - z) * s = (q - 8) * s + (8 - z) * s. Signed codes are held as q + 8 already.
        middle = 0 if scheme.element.signed else 8
        zero = torch.zeros_like(scale) if weight.zeros is None else (middle - weight.zeros.to(torch.float32)) * scale
        return cls(_pack(fill, rows, columns), _interleave(scale, zero, dtype), group_size, order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if self.order is not None:
            flat = flat[:, self.order]
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, self.packed, self.group_size, self.scales_and_zeros
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])


class GgufInt4Linear(Int4Linear):
    """ggml's 4-bit affine blocks: q4_0, q4_1 and q4_k are groups of 32 with a scale and, but for q4_0, a minimum."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> GgufInt4Linear:
        weight = layer.weight
        assert isinstance(weight.scheme.weight.element, Block)
        kind, (rows, columns) = weight.scheme.weight.element.type, weight.shape
        block = BLOCK_TYPES[kind]
        read = {"q4_0": _read_q4_0, "q4_1": _read_q4_1, "q4_k": _read_q4_k}[kind]

        def blocks(start: int, stop: int) -> torch.Tensor:
            return weight.codes[start:stop].reshape(-1, columns // block.elements, block.nbytes)

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            # Runs of 32 bytes (q4_k) or 16 (the others): their low nibbles first, then the high ones.
            run = 32 if kind == "q4_k" else 16
            quants = blocks(start, stop)[..., block.nbytes - block.elements // 2 :].reshape(stop - start, -1, run)
            halves = out.view(stop - start, -1, 2, run)
            torch.bitwise_and(quants, 15, out=halves[..., 0, :])
            torch.bitwise_right_shift(quants, 4, out=halves[..., 1, :])

        parts = [read(blocks(start, min(start + _ROWS, rows))) for start in range(0, rows, _ROWS)]
        scale, zero = (torch.cat(part).reshape(rows, columns // 32) for part in zip(*parts, strict=True))
        return cls(_pack(fill, rows, columns), _interleave(scale, zero, dtype), 32)


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


def _pack(fill: Callable[[int, int, torch.Tensor], None], rows: int, columns: int) -> torch.Tensor:
    """uint8 [rows, columns / 2] in torch's layout; `fill` writes the codes of rows start..stop into an int32 matrix."""
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    codes = torch.empty(_ROWS, columns, dtype=torch.int32)
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        fill(start, stop, codes[: stop - start])
        packed[start:stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes[: stop - start], 8)
    return packed


def _interleave(scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[groups, rows, 2], as the operator reads them."""
    return torch.stack([scale.to(dtype).t(), zero.to(dtype).t()], -1).contiguous()


def _sorted_by_group(index: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns in the order of their groups."""
    counts = torch.bincount(index)
    if bool((counts != group_size).any()):
        raise Refused(
            Refusal("shape-unsupported", "notimpl", "torch_int4pack", "act-order groups must all be of one size",
                    f"found groups of {int(counts.min())} to {int(counts.max())} columns, expected {group_size}",
                    "Another kernel takes this layer.")
        )  # fmt: skip
    return torch.argsort(index, stable=True)
