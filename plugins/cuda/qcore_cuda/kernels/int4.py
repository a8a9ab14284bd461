"""Weight-only int4 through torch's `_weight_int4pack_mm`, whose tensor-core kernel takes bfloat16 (ATen's int4mm.cu)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from qcore.kernels.int4pack import Int4Pack

_TILES = (8, 4, 2)
"""How many runs of 16 columns the layout keeps together; the most that divide K."""
_MOST_ROWS = 64
"""Rows of inputs up to which the operator is quicker than a dense product with the weight dequantized first: it reads the whole
weight for every 16 of them."""
_ELEMENTS = 1 << 24
"""Weights dequantized at a time: 32 MiB of bfloat16."""


class Int4Linear(Int4Pack):
    """int32 [N / 8, K / (16 tiles), 32, tiles / 2]: 8 rows by 16 columns as a warp's 32 lanes hold them."""

    places: torch.Tensor

    def __init__(
        self, packed: torch.Tensor, scales_and_zeros: torch.Tensor, group_size: int, order: torch.Tensor | None = None
    ) -> None:
        super().__init__(packed, scales_and_zeros, group_size, order)
        self.register_buffer("places", places(self.pack, 2 * packed.shape[-1]).clone())

    @classmethod
    def pack(cls, codes: torch.Tensor) -> torch.Tensor:
        """Only a GPU packs: the current one does, and the layout comes back."""
        pairs = codes.view(len(codes), -1, 2)
        bytes_ = (pairs[..., 0] << 4 | pairs[..., 1]).to(
            torch.uint8
        )  # the first of two columns is the high nibble here
        tiles = next(n for n in _TILES if codes.shape[1] % (16 * n) == 0)
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(bytes_.cuda(), tiles).cpu()
        return packed

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if not len(x):
            return x.new_empty(0, self.scales_and_zeros.shape[1])
        if len(x) > _MOST_ROWS:
            return self._dense_product(x)
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group_size, self.scales_and_zeros)
        return out

    def _dense_product(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.scales_and_zeros.shape[1]
        step = max(8, _ELEMENTS // x.shape[1] // 8 * 8)
        out = x.new_empty(len(x), rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            out[:, start:stop] = torch.nn.functional.linear(x, self.dequantize(start, stop))
        return out

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, multiples of 8, of the weight as the operator has it: bfloat16, columns in its own order."""
        codes = nibbles(self.packed[start // 8 : stop // 8])[..., self.places]
        codes = codes.unflatten(2, (8, -1)).transpose(1, 2).reshape(stop - start, -1, self.group_size)
        scale, zero = self.scales_and_zeros[:, start:stop].permute(2, 1, 0).unsqueeze(-1).unbind()
        return torch.addcmul(zero, (codes.view(torch.int8) - 8).to(scale.dtype), scale).flatten(1)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N / 8, K / (16 tiles), 128 tiles] of the layout, the low one of each byte first."""
    bytes_ = packed.contiguous().view(torch.uint8).flatten(2)
    return torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(2)


@cache
def places(pack: Callable[[torch.Tensor], torch.Tensor], tiles: int) -> torch.Tensor:
    """Which nibble of 8 x (16 tiles) codes holds each of them, in row order: int64 [128 tiles]. Found by packing each code's own
    number, four bits at a time, for no document promises the layout."""
    numbers = torch.arange(128 * tiles, dtype=torch.int32).view(8, -1)
    digits = [nibbles(pack(numbers >> shift & 15)).flatten().to(torch.int64) << shift for shift in (0, 4, 8)]
    return torch.stack(digits).sum(0).argsort()
