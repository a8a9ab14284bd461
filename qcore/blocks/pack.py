"""The inverse of `unpack`: fields into bytes, codes into blocks.

Blocks come as uint8 [B, bytes per block]; B counts blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 65504.0
"""The largest float16: larger scales are cut to it, because a scale of infinity would make the whole block NaN."""


def half(values: Tensor) -> Tensor:
    """Float32 [B, n] as float16, uint8 [B, 2 * n]."""
    return values.clamp(-LARGEST, LARGEST).half().contiguous().view(torch.uint8)


def words(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers [B, n] as words of `dtype` (int16 or int32), whose bits may reach into the sign: uint8 [B, n * size]."""
    return values.contiguous().view(-1, 1).to(dtype).view(torch.uint8).view(values.shape[0], -1)


def planes(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, where a byte holds codes that are far apart: [..., 8 / bits, n] -> uint8 [..., n]."""
    return _joined(codes.unbind(-2), bits)


def neighbours(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, where a byte holds codes that follow each other: [..., n * 8 / bits] -> uint8 [..., n]."""
    return _joined(codes.unflatten(-1, (-1, 8 // bits)).unbind(-1), bits)


def _joined(parts: tuple[Tensor, ...], bits: int) -> Tensor:
    packed = parts[0].to(torch.uint8)
    for i, part in enumerate(parts[1:], 1):
        packed = packed | part.to(torch.uint8) << (bits * i)
    return packed
