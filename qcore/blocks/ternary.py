"""The ternary types: 256 elements of -1, 0 or 1 per block, times a float16 scale.

Layouts and formulas: ggml's src/ggml-common.h and src/ggml-quants.c. Each function takes uint8 [B, bytes per block] and
returns its parts, codes in the order of the elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.blocks.unpack import Parts, half, planes


def tq1_0(blocks: Tensor) -> Parts:
    """d * (t - 1), with five base-3 digits t to a byte (four in the last four bytes), the first digit highest."""
    stretches = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    codes = torch.cat([_shifted(blocks[:, start:stop], digits) for start, stop, digits in stretches], 1)
    # A byte is the fraction 0.ttttt in base 3, scaled to 256 and rounded up: times three, its integer part is a digit.
    return Parts((codes.to(torch.int16) * 3 >> 8).to(torch.int8).sub_(1), half(blocks, 52))


def tq2_0(blocks: Tensor) -> Parts:
    """d * (q - 1), four 2-bit codes to a byte, 32 elements apart."""
    codes = planes(blocks[:, :64].view(-1, 2, 32), 2)
    return Parts(codes.view(torch.int8).sub_(1), half(blocks, 64))


def _shifted(packed: Tensor, digits: int) -> Tensor:
    """Each byte with its first 0, 1, ... digits shifted out (bytes wrap): uint8 [B, n] -> [B, digits * n]."""
    return torch.stack([packed * 3**digit for digit in range(digits)], 1).flatten(1)
