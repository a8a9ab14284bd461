"""Integer codes as GPU kernels read them: bytes in a row for columns in a row, of which one shift and one mask make as many codes.

Columns are cut into chunks of `parts` sections; a section is what one matrix product takes, and lies in one group. The bits of a
code stand in planes of 8, 4, 2 and 1 bits, the widest with the lowest bits first (3 bits: a plane of 2, then one of 1). A plane of
b bits has `parts * b / 8` vectors of `section` bytes: byte i of vector v holds column i of the sections v * 8 / b, v * 8 / b + 1 ..,
the first of them in its lowest bits. A row is one chunk after the other, a chunk one plane after the other.
"""

from __future__ import annotations

import math

import torch

_LONGEST = 64
"""Columns of a section, at most; of 8 bits twice as many, for their bytes are not shared."""


def section_of(bits: int, group: int) -> int:
    """Columns of a section, where `group` of them are under one scale; 0: all."""
    return math.gcd(_LONGEST * (1 + bits // 8), group)


def planes_of(bits: int) -> tuple[int, ...]:
    """Widths of the planes, the one with the lowest bits first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def parts_of(bits: int) -> int:
    """Sections of a chunk: as many as share the bytes of the narrowest plane."""
    return 8 // planes_of(bits)[-1]


def together_of(bits: int) -> int:
    """Sections that share the bytes of the widest plane; of those of one bit, half."""
    return min(4, 8 // planes_of(bits)[0])


def pack_planes(codes: torch.Tensor, bits: int, section: int) -> torch.Tensor:
    """codes: uint8 [N, K], below 2^bits. uint8 [N, chunks * section * parts * bits / 8]; columns behind K are zeros."""
    parts = parts_of(bits)
    chunks = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (section * parts))).unflatten(1, (-1, parts, section))
    found, below = [], 0
    for width in planes_of(bits):
        stacked = 8 // width
        plane = (chunks >> below & (1 << width) - 1).unflatten(2, (parts // stacked, stacked))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
        found.append((plane << shifts).sum(3, dtype=torch.uint8).flatten(2))
        below += width
    return torch.cat(found, 2).flatten(1)
