"""Codes of 1 to 8 bits in words of 32, for torch's own operators: Gaudi's shifts and masks are of int32.

A code's bits lie in planes of 8, 4, 2 and 1 bits, the widest with the lowest bits (3 bits: a plane of 2, then one of 1). A word of a plane of b bits has codes
of 32 / b columns, the first lowest, which are a run apart: word j of a row has columns j, j + run, j + 2 run .. So one shift for each part of the words
makes columns in their order, and nothing has to be interleaved.
"""

from __future__ import annotations

import torch

_WORD = 32


def planes_of(bits: int) -> tuple[int, ...]:
    """Widths of the planes, the one with the lowest bits first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K], below 2^bits -> int32 [N, words], one plane after the other."""
    found, below = [], 0
    for width in planes_of(bits):
        parts = _WORD // width
        plane = (codes >> below & (1 << width) - 1).to(torch.int64)
        plane = torch.nn.functional.pad(plane, (0, -codes.shape[1] % parts)).unflatten(1, (parts, -1))
        shifts = torch.arange(0, _WORD, width).unsqueeze(-1)
        found.append((plane << shifts).sum(1).to(torch.int32))  # of 64 bits the lower half is kept
        below += width
    return torch.cat(found, 1)


def unpacked(words: torch.Tensor, shifts: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The reverse: int32 [N, K]. shifts: int32 0 .. 31 on the words' device."""
    codes, below = None, 0
    for width in planes_of(bits):
        run = -(-columns * width // _WORD)
        plane, words = words[:, :run], words[:, run:]
        parts = plane.unsqueeze(1) >> shifts[::width].unsqueeze(-1) & (1 << width) - 1
        part = parts.reshape(len(parts), -1)[:, :columns]
        codes = part if codes is None else codes | part << below
        below += width
    assert codes is not None
    return codes
