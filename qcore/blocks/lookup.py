"""The types whose 4-bit codes stand for the values of a fixed table: iq4_nl, iq4_xs, mxfp4 and nvfp4.

Layouts and formulas: ggml's src/ggml-common.h, src/ggml-quants.c and src/ggml-impl.h (the 8-bit scales). Each function
takes uint8 [B, bytes per block] and returns its parts, codes in the order of the elements. Runs of 2n elements hold the
first n in the low and the others in the high halves of n bytes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qcore.blocks.unpack import Parts, field, half, neighbours, planes

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""E2M1 times two, hence integers; code 8 is plain zero. The scales are halved to make up for it."""


def iq4_nl(blocks: Tensor) -> Parts:
    """d * table[q]."""
    return Parts(_look_up(IQ4, blocks[:, 2:]), half(blocks, 0))


def iq4_xs(blocks: Tensor) -> Parts:
    """8 runs: d * (s - 32) * table[q], the scales' four low and two high bits stored apart."""
    high = neighbours(field(blocks, torch.uint8, 2, 2), 2)  # a 16-bit word, whose low byte comes first
    scales = neighbours(blocks[:, 4:8], 4).add_(high, alpha=16).view(torch.int8).sub_(32)
    return Parts(_look_up(IQ4, blocks[:, 8:].view(-1, 8, 16)), half(blocks, 0) * scales)


def mxfp4(blocks: Tensor) -> Parts:
    """2^(e - 128) * table[q]; e = 255 is no NaN here."""
    exponent = blocks[:, :1].int()
    # The two smallest exponents need float32's denormals: 2^-128 and 2^-127.
    bits = torch.where(exponent < 2, (exponent + 1) << 21, (exponent - 1) << 23)
    return Parts(_look_up(FP4_DOUBLED, blocks[:, 1:]), bits.view(torch.float32))


def nvfp4(blocks: Tensor) -> Parts:
    """4 runs: e4m3(s) / 2 * table[q]; the sign bit of s is ignored, and 0x7f means zero."""
    scales = blocks[:, :4]
    # Four exponent and three mantissa bits, read as the low exponent and high mantissa bits of a float16 (bias 15).
    values = ((scales & 127).to(torch.int16) << 7).view(torch.float16).float().mul_(2.0 ** (15 - 7 - 1))
    return Parts(_look_up(FP4_DOUBLED, blocks[:, 4:].view(-1, 4, 8)), values.masked_fill_(scales == 127, 0.0))


def _look_up(values: tuple[int, ...], packed: Tensor) -> Tensor:
    codes = planes(packed, 4)
    return _table(values, packed.device).index_select(0, codes.flatten().int()).view(codes.shape)


@functools.cache
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int8, device=device)
