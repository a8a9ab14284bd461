"""Weight-only int4 through torch's `_weight_int4pack_mm_for_cpu`.

Only bfloat16 is vectorized (float32 and float16 ran 50 times slower when measured), so that is what the rows in plugin.py
claim.
"""

from __future__ import annotations

import torch

from qcore.kernels.int4pack import Int4Pack


class Int4Linear(Int4Pack):
    """uint8 [N, K / 2], in blocks of 64 rows."""

    @classmethod
    def pack(cls, codes: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 8)
        return packed

    def product(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, self.group_size, self.scales_and_zeros
        )
        return out
