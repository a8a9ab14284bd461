"""The kv cache in 8 bits: in e4m3 by Gaudi's casts, in the bytes that it has everywhere, those above 240 among them; in int8 by torch's operators."""

from __future__ import annotations

import torch

from qcore.elements import Int
from qcore.kernels.kv_cache import KvRounding
from qcore_gaudi.kernels.e4m3 import from_bytes, to_bytes


class KvCache(KvRounding):
    """What KvRounding does, whose arithmetic is in float32 too."""

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        if isinstance(self.element, Int):
            return super().encode(states)
        self._follow(states.device)
        wide = states.to(torch.float32)
        if self.scale is None:
            scale = self._dynamic(wide)
            return torch.cat([to_bytes(wide / scale), scale.view(torch.uint8)], -1)
        return to_bytes(wide / self.scale if self.inverse is None else wide * self.inverse)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(self.element, Int):
            return super().decode(rows, dtype)
        self._follow(rows.device)
        if self.scale is None:
            scale = rows[..., -4:].contiguous().view(torch.float32)
            return (from_bytes(rows[..., :-4].contiguous()) * scale).to(dtype)
        return (from_bytes(rows) * self.scale).to(dtype)
