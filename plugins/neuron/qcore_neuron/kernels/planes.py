"""Codes of 1 to 12 bits in bytes whose codes lie far apart, so that taking them out needs no gather: with 4 bits, byte j of a row of K columns holds column j in its
low half and column j + K / 2 in its high one. Codes of 3 bits, 5 and so on are their low bits and, behind them, their high ones.

They are taken out by division and floor, for the compiler shifts 32-bit integers only (AWS's documentation of neuronx-cc's error NCC_EVRF022).
"""

from __future__ import annotations

import torch

from qcore.bits import unpack

_WIDTHS = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
    9: (8, 1),
    10: (8, 2),
    12: (8, 4),
}
"""Bits of each part of a code, from the lowest."""
_ROWS = 256
"""Rows repacked at a time."""


def to_planes(packed: torch.Tensor, bits: int, columns: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """The canonical bit stream, uint8 [N, K bits / 8], to planes of the same size. order: of the columns, int64 [K]."""
    parts = (unpack(part, bits, columns) for part in packed.split(_ROWS))
    return torch.cat([planes_of(part if order is None else part[:, order], bits) for part in parts])


def planes_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes [N, K], K a multiple of 8 -> uint8 [N, K bits / 8]."""
    parts = []
    for width in _WIDTHS[bits]:
        count = 8 // width
        runs = (codes & ((1 << width) - 1)).to(torch.uint8).unflatten(1, (count, -1))
        held = runs[:, 0].clone()
        for place in range(1, count):
            held |= runs[:, place] << (width * place)
        parts.append(held)
        codes = codes >> width
    return torch.cat(parts, 1)


def from_planes(planes: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes as whole numbers, float32 [N, K]."""
    columns = planes.shape[1] * 8 // bits
    codes, start, weight = None, 0, 1.0
    for width in _WIDTHS[bits]:
        part = _taken_out(planes[:, start : start + columns * width // 8], width)
        codes = part if codes is None else codes + part * weight
        start, weight = start + columns * width // 8, weight * 2.0**width
    assert codes is not None
    return codes


def _taken_out(part: torch.Tensor, width: int) -> torch.Tensor:
    found, rest = [], part.to(torch.float32)
    for _ in range(8 // width - 1):
        high = torch.floor(rest * 0.5**width)
        found.append(rest - high * 2.0**width)
        rest = high
    return torch.cat([*found, rest], 1)
