"""What the block types share: taking fields out of blocks, codes out of bytes, and applying scales.

Blocks come as uint8 [B, bytes per block]; B counts blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def field(blocks: Tensor, dtype: torch.dtype, offset: int, count: int = 1) -> Tensor:
    """`count` multi-byte values that begin at byte `offset` of each block: [B, count] of `dtype`."""
    part = blocks[:, offset : offset + dtype.itemsize * count]
    # Always a copy: torch refuses to view bytes at an odd place as wider values.
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at byte `offset` of each block, as float32 [B, 1]."""
    return field(blocks, torch.float16, offset).float()


def planes(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, where a byte holds codes that are far apart: uint8 [..., n] -> [..., 8 / bits, n]."""
    return torch.stack(_codes(packed, bits), -2)


def neighbours(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, where a byte holds codes that follow each other: uint8 [..., n] -> [..., n * 8 / bits]."""
    return torch.stack(_codes(packed, bits), -1).flatten(-2)


def _codes(packed: Tensor, bits: int) -> list[Tensor]:
    packed = packed.contiguous()  # vectorized shifts need long runs, and a block's bytes are a short one
    mask = (1 << bits) - 1
    return [(packed >> shift) & mask for shift in range(0, 8, bits)]


class Parts(NamedTuple):
    """What blocks hold: codes * scale - minimum, each scale and minimum serving an equal run of a block's codes.

    codes: uint8 or int8 [B, ...], all of a block's codes in the order of its elements. scale, minimum: float32 [B, runs].
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    def values(self) -> Tensor:
        """float32 [B, runs, codes per run]. The products are exact in all types, so that only the subtraction rounds."""
        values = self.codes.flatten(1).float()
        values = values.view(*self.scale.shape, values.shape[1] // self.scale.shape[1])
        values.mul_(self.scale.unsqueeze(-1))
        return values if self.minimum is None else values.sub_(self.minimum.unsqueeze(-1))
