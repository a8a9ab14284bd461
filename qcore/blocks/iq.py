"""The IQ1, IQ2 and IQ3 types: 256 elements per block, in tuples of 4 or 8 that are looked up in a grid.

Layouts and formulas: ggml's src/ggml-common.h and src/ggml-quants.c. Each function takes uint8 [B, bytes per block] and
returns its parts, codes in the order of the elements. Words are little-endian and may be unsigned; they are read into int32,
where a shift brings the sign along, so every shift is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.blocks.grids import grid, shifted_grid, signs
from qcore.blocks.unpack import Parts, field, half, neighbours


def iq2_xxs(blocks: Tensor) -> Parts:
    """8 runs: d * (s + 1/2) / 4 * grid[8-bit index] * signs, each run with four indices and a word of signs and s."""
    indices = blocks[:, 2:66].view(-1, 8, 2, 4)[:, :, 0].flatten(1)
    words = field(blocks, torch.int32, 2, 16)[:, 1::2]
    codes = _signed_tuples("iq2_xxs", indices, _sign_codes(words), 7)
    return Parts(codes, _scales(half(blocks, 0), words >> 28 & 15, 0.25))


def iq2_xs(blocks: Tensor) -> Parts:
    """16 runs: d * (s + 1/2) / 4 * grid[9-bit index] * signs, index and 7 sign bits sharing a word."""
    words = field(blocks, torch.int16, 2, 32).int()
    codes = _signed_tuples("iq2_xs", words & 511, words >> 9 & 127, 7)
    return Parts(codes, _scales(half(blocks, 0), neighbours(blocks[:, 66:], 4), 0.25))


def iq2_s(blocks: Tensor) -> Parts:
    """16 runs: d * (s + 1/2) / 4 * grid[10-bit index] * signs, the index's two high bits stored apart."""
    indices = blocks[:, 2:34].int().add_(neighbours(blocks[:, 66:74], 2), alpha=256)
    codes = _signed_tuples("iq2_s", indices, blocks[:, 34:66], 8)
    return Parts(codes, _scales(half(blocks, 0), neighbours(blocks[:, 74:], 4), 0.25))


def iq3_xxs(blocks: Tensor) -> Parts:
    """8 runs: d * (s + 1/2) / 2 * grid[8-bit index] * signs, each run with eight indices and a word of signs and s."""
    words = field(blocks, torch.int32, 66, 8)
    codes = _signed_tuples("iq3_xxs", blocks[:, 2:66], _sign_codes(words), 7)
    return Parts(codes, _scales(half(blocks, 0), words >> 28 & 15, 0.5))


def iq3_s(blocks: Tensor) -> Parts:
    """8 runs: d * (2 * s + 1) * grid[9-bit index] * signs, the index's high bit stored apart."""
    indices = blocks[:, 2:66].int().add_(neighbours(blocks[:, 66:74], 1), alpha=256)
    codes = _signed_tuples("iq3_s", indices, blocks[:, 74:106], 8)
    return Parts(codes, _scales(half(blocks, 0), neighbours(blocks[:, 106:], 4), 2.0))


def iq1_s(blocks: Tensor) -> Parts:
    """8 runs: d * (2 * s + 1) * (grid[11-bit index] +- 1/8), a run's word with the high bits, s and the sign."""
    words = field(blocks, torch.int16, 34, 8).int()
    high = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], 2) + (words >> 12 & 8).unsqueeze(2)
    return Parts(_shifted_tuples(blocks[:, 2:34], high.flatten(1)), _scales(half(blocks, 0), words >> 12 & 7, 0.25))


def iq1_m(blocks: Tensor) -> Parts:
    """16 runs: d * (2 * s + 1) * (grid[11-bit index] +- 1/8), d's four hex digits on top of the words of scales."""
    words = field(blocks, torch.int16, 48, 4).int()
    digits = torch.stack([(word >> 12 & 15) << 4 * i for i, word in enumerate(words.unbind(1))], 1)
    d = digits.sum(1, keepdim=True).to(torch.int16).view(torch.float16).float()
    scales = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], 2).flatten(1)
    return Parts(_shifted_tuples(blocks[:, :32], neighbours(blocks[:, 32:48], 4)), _scales(d, scales, 0.25))


def _scales(d: Tensor, codes: Tensor, factor: float) -> Tensor:
    """d * (codes + 1/2) * factor, exact in float32. d * (2 * s + 1) has factor 2, or 1/4 where tuples hold eighths."""
    return (codes.float() + 0.5).mul_(d).mul_(factor)


def _sign_codes(words: Tensor) -> Tensor:
    """The four 7-bit sign codes of each 32-bit word: int32 [B, n] -> [B, 4 * n]."""
    return torch.stack([words >> shift & 127 for shift in (0, 7, 14, 21)], 2).flatten(1)


def _signed_tuples(name: str, indices: Tensor, sign_codes: Tensor, sign_bits: int) -> Tensor:
    """The grid's tuples times their signs, int8 [B, 256]."""
    values = _select(grid(name, indices.device), indices)
    return values.mul_(_select(signs(sign_bits, indices.device), sign_codes))


def _shifted_tuples(low: Tensor, high: Tensor) -> Tensor:
    """Eight times (grid +- 1/8), int8 [B, 256]. low: uint8 [B, 32], an index's low byte; high: its other three bits,
    with the sign of the shift as a fourth."""
    return _select(shifted_grid(low.device), low.int().add_(high, alpha=256))


def _select(table: Tensor, indices: Tensor) -> Tensor:
    return table.index_select(0, indices.flatten().int()).view(torch.int8).view(-1, 256)
