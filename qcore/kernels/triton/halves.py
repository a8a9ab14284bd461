"""8-bit codes as float16, which has every number that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from qcore.platform import Target

MANTISSAS = {"int8": -1, "e4m3fn": 3, "e5m2": 2}
"""Mantissa bits, and below 0 whole numbers, as qcore.kernels.triton.rounding has them."""

_WORDS = {
    # 1024 + 128 + q is put together as its bits, which are those of 1024 and the code's below them.
    "int8": """{
    .reg .b32 word, lift;
    xor.b32 word, $2, 0x80808080;
    mov.b32 lift, 0x64806480;
    prmt.b32 $0, word, 0x64646464, 0x5140;
    prmt.b32 $1, word, 0x64646464, 0x5342;
    sub.f16x2 $0, $0, lift;
    sub.f16x2 $1, $1, lift;
}""",
    # Sign and magnitude where float16 has its own, the exponent as it is: too small by 2^8. All ones where there is no number.
    "e4m3fn": """{
    .reg .b32 none, word, shift, times;
    and.b32 none, $2, 0x7F7F7F7F;
    add.u32 none, none, 0x01010101;
    mov.b32 times, 0x5C005C00;
    prmt.b32 word, $2, 0, 0x1404;
    shr.u32 shift, word, 1;
    and.b32 shift, shift, 0x3F803F80;
    and.b32 word, word, 0x80008000;
    or.b32 word, word, shift;
    prmt.b32 shift, none, 0, 0x9988;
    or.b32 word, word, shift;
    mul.f16x2 $0, word, times;
    prmt.b32 word, $2, 0, 0x3424;
    shr.u32 shift, word, 1;
    and.b32 shift, shift, 0x3F803F80;
    and.b32 word, word, 0x80008000;
    or.b32 word, word, shift;
    prmt.b32 shift, none, 0, 0xBBAA;
    or.b32 word, word, shift;
    mul.f16x2 $1, word, times;
}""",
    # The upper bytes of float16's.
    "e5m2": """{
    prmt.b32 $0, $2, 0, 0x1404;
    prmt.b32 $1, $2, 0, 0x3424;
}""",
}
"""Four codes of a word to float16, in NVIDIA's instructions: a few for all of them, where Triton has a few for each."""
_FP8_WORDS = _WORDS | {
    "e4m3fn": """{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}"""
}
"""The same where there is an instruction for e4m3fn."""


@triton.jit  # type: ignore[untyped-decorator]
def halves_of(codes, MANTISSA: tl.constexpr, WORDS: tl.constexpr, PURE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What uint8 codes stand for before they are scaled, in float16, which has all of it. WORDS: instructions for four codes, or empty. PURE: they may be
    moved behind a change of the codes' layout."""
    if WORDS != "":
        halves = tl.inline_asm_elementwise(WORDS, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=PURE, pack=4)
    elif MANTISSA < 0:
        halves = ((codes ^ 128).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    elif MANTISSA == 3:
        wide = codes.to(tl.int8, bitcast=True).to(tl.int16)
        bits = ((wide << 7) & 0x3F80) | (wide & -32768)
        halves = tl.where((wide & 0x7F) == 0x7F, float("nan"), bits.to(tl.float16, bitcast=True) * 256.0)
    else:
        halves = (codes.to(tl.int16) << 8).to(tl.float16, bitcast=True)
    return halves


def words_for(element: str, target: Target | None) -> str:
    """WORDS of halves_of on the target. element: a key of MANTISSAS."""
    if target is None or target.backend != "cuda":
        return ""
    return (_FP8_WORDS if target.fp8 else _WORDS)[element]
