"""Weight-only int4 through torch's `_weight_int4pack_mm`, whose tensor-core kernel takes bfloat16 (ATen's int4mm.cu)."""

from __future__ import annotations

import torch

from qcore.kernels.int4pack import Int4Pack

_TILES = (8, 4, 2)
"""How many runs of 16 columns the layout keeps together; the most that divide K."""


class Int4Linear(Int4Pack):
    """int32 [N / 8, K / (16 tiles), 32, tiles / 2]: 8 rows by 16 columns as a warp's 32 lanes hold them."""

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
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group_size, self.scales_and_zeros)
        return out
