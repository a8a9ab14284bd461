"""The types with one level of scales: one float16 scale (and minimum) per block of 32, 64 or 128.

Layouts and formulas: ggml's src/ggml-common.h and src/ggml-quants.c. Each function takes uint8 [B, bytes per block] and
returns its parts, codes in the order of the elements. Blocks of 32 with 4-bit codes hold elements 0..15 in the low and
16..31 in the high halves of their bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.blocks.unpack import Parts, half, neighbours, planes


def q4_0(blocks: Tensor) -> Parts:
    """d * (q - 8)."""
    return Parts(planes(blocks[:, 2:], 4).view(torch.int8).sub_(8), half(blocks, 0))


def q4_1(blocks: Tensor) -> Parts:
    """d * q + m."""
    return Parts(planes(blocks[:, 4:], 4), half(blocks, 0), -half(blocks, 2))


def q5_0(blocks: Tensor) -> Parts:
    """d * (q - 16); the fifth bits are a 32-bit little-endian word, element j's at bit j."""
    return Parts(_five_bits(blocks[:, 2:]).view(torch.int8).sub_(16), half(blocks, 0))


def q5_1(blocks: Tensor) -> Parts:
    """d * q + m, with codes as in q5_0."""
    return Parts(_five_bits(blocks[:, 4:]), half(blocks, 0), -half(blocks, 2))


def q8_0(blocks: Tensor) -> Parts:
    """d * q, q signed."""
    return Parts(blocks[:, 2:].view(torch.int8), half(blocks, 0))


def q1_0(blocks: Tensor) -> Parts:
    """d where the bit is set, else -d; lowest bit first."""
    return Parts(neighbours(blocks[:, 2:], 1).view(torch.int8).mul_(2).sub_(1), half(blocks, 0))


def q2_0(blocks: Tensor) -> Parts:
    """d * (q - 1); lowest bits first."""
    return Parts(neighbours(blocks[:, 2:], 2).view(torch.int8).sub_(1), half(blocks, 0))


def _five_bits(packed: Tensor) -> Tensor:
    """Four bytes of fifth bits, 16 bytes of low halves: [B, 20] -> codes [B, 32]."""
    return planes(packed[:, 4:], 4).flatten(1).add_(neighbours(packed[:, :4], 1), alpha=16)
