"""The K types: 256 elements per block, whose 8 or 16 runs have integer scales (and minima) under the block's float16.

Layouts and formulas: ggml's src/ggml-common.h and src/ggml-quants.c. Each function takes uint8 [B, bytes per block] and
returns its parts, codes in the order of the elements. Codes lie in bytes 32 (or 64) elements apart: all the low bits of a
stretch of bytes first, then the next bits of the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.blocks.unpack import Parts, half, planes


def q2_k(blocks: Tensor) -> Parts:
    """16 runs: d * s * q - dmin * m, s and m the low and high halves of the run's byte."""
    scales = blocks[:, :16]
    codes = planes(blocks[:, 16:80].view(-1, 2, 32), 2)
    return Parts(codes, half(blocks, 80) * (scales & 15), half(blocks, 82) * (scales >> 4))


def q3_k(blocks: Tensor) -> Parts:
    """16 runs: d * (s - 32) * (q - 4), q's third bit from the mask, bit i of its byte l for element 32 * i + l."""
    low = planes(blocks[:, 96:104], 4).flatten(1)
    scales = planes(blocks[:, 104:108], 2).flatten(1).mul_(16).add_(low).view(torch.int8).sub_(32)
    codes = planes(blocks[:, 32:96].view(-1, 2, 32), 2).flatten(1)
    codes.add_(planes(blocks[:, :32], 1).flatten(1), alpha=4)
    return Parts(codes.view(torch.int8).sub_(4), half(blocks, 108) * scales)


def q4_k(blocks: Tensor) -> Parts:
    """8 runs: d * s * q - dmin * m."""
    scales, minima = _scales_and_minima(blocks)
    return Parts(planes(blocks[:, 16:].view(-1, 4, 32), 4), scales, minima)


def q5_k(blocks: Tensor) -> Parts:
    """8 runs: d * s * q - dmin * m, the fifth bit of element 32 * i + l at bit i of byte l."""
    scales, minima = _scales_and_minima(blocks)
    codes = planes(blocks[:, 48:].view(-1, 4, 32), 4).flatten(1)
    codes.add_(planes(blocks[:, 16:48], 1).flatten(1), alpha=16)
    return Parts(codes, scales, minima)


def q6_k(blocks: Tensor) -> Parts:
    """16 runs: d * s * (q - 32), s a signed byte; four low bits and two high bits are stored apart."""
    codes = planes(blocks[:, :128].view(-1, 2, 64), 4).flatten(1)
    codes.add_(planes(blocks[:, 128:192].view(-1, 2, 32), 2).flatten(1), alpha=16)
    return Parts(codes.view(torch.int8).sub_(32), half(blocks, 208) * blocks[:, 192:208].view(torch.int8))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """q4_k's and q5_k's eight scales and minima times d and dmin, float32 [B, 8] each.

    Both are 6-bit codes in 12 bytes: the first four scales and the first four minima fill the low bits of a byte each,
    and the rest has its four low bits in the last four bytes, its two high bits on top of the first eight.
    """
    first, second, third = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], 1)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], 1)
    return half(blocks, 0) * scales, half(blocks, 2) * minima
