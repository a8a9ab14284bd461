"""One row of x times codes, without a matrix unit: a word of codes is masked and multiplied as it is.

Whole numbers: a code that is masked where it stands in its word is, as a float32's bits, a number below the smallest normal one: the code times a power
of two, which x is divided by beforehand. So a weight takes one mask and one multiplication and addition. Zero points are subtracted from sums,
times the sum of x. All is in float32: x is multiplied by 2^64 at first and the sum by what it lacks at last, so that no product of
columns from 2^-40 to 2^60 is rounded for being small or large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcore.kernels.triton.multiply import group_of, parts_of_expert

VECTOR_BYTES = 64
"""Of a row in a tile, from each of the vectors that planes are made of (planes.py): so many columns of a section, or of some chunks' sections."""


@triton.jit  # type: ignore[untyped-decorator]
def looked_up(word, table, PLACE: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32: entries of the table, by the codes at the bits PLACE, PLACE + 8, PLACE + 16 and PLACE + 24 of int32 words; four tensors. One gather,
    for the table goes through shared memory, which programs wait for."""
    mask: tl.constexpr = (1 << BITS) - 1
    evens = tl.join((word >> PLACE) & mask, (word >> (PLACE + 16)) & mask)
    odds = tl.join((word >> (PLACE + 8)) & mask, (word >> (PLACE + 24)) & mask)
    places = tl.join(evens, odds)
    values = tl.reshape(tl.gather(table, tl.reshape(places, (places.numel,)), 0), places.shape)
    evens, odds = tl.split(values)
    first, third = tl.split(evens)
    second, fourth = tl.split(odds)
    return first, second, third, fourth


@triton.jit  # type: ignore[untyped-decorator]
def products_of(word, x, PLACE: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32, of what the codes at bit PLACE of int32 words stand for, and x; they lack a power of two (multiply_vector)."""
    if EXPONENT > 0:
        bits = ((word << (32 - BITS - PLACE)) >> (8 - EXPONENT)) & (
            -(1 << 31) | ((1 << (BITS - 1)) - 1) << (24 + EXPONENT - BITS)
        )
        products = bits.to(tl.float32, bitcast=True) * (x * 2.0**64)[None, :]
    elif PLACE + BITS <= 23:
        value = (word & (((1 << BITS) - 1) << PLACE)).to(tl.float32, bitcast=True)
        products = value * (x * 2.0 ** (64 - PLACE))[None, :]
    else:
        value = ((word >> 9) & (((1 << BITS) - 1) << (PLACE - 9))).to(tl.float32, bitcast=True)
        products = value * (x * 2.0 ** (73 - PLACE))[None, :]
    return products


@triton.jit  # type: ignore[untyped-decorator]
def spread(scale, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BN, 16] of [BN * 4], each for four words."""
    return tl.reshape(tl.broadcast_to(tl.reshape(scale, (BN, 4, 1)), (BN, 4, 4)), (BN, 16))


@triton.jit(do_not_specialize=("M", "shares"))  # type: ignore[untyped-decorator]
def multiply_vector(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr, blocks_ptr, out_ptr,
    M, N, K, start, x_stride, row_bytes, shares,
    BITS: tl.constexpr, CENTER: tl.constexpr, EXPONENT: tl.constexpr, BIAS: tl.constexpr, TABLE: tl.constexpr, GROUP: tl.constexpr,
    COARSE_GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr, SECTION: tl.constexpr,
    RUN: tl.constexpr, DENSE: tl.constexpr, ROUTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [shares, M, N] of x [M, K], a row of x for a program. blocks: int32 [M], the rows' experts, where ROUTED. The
    rest as multiply_codes has it; DENSE is false, BM 1.

    Tiles are [BN, 16 words], of one chunk or more; a thread has four words of a row, so that it has few columns of x and some rows. Scales are loaded for each
    four words of a row, [BN * 4], which is how threads have the words: none waits for scales that others load."""
    width: tl.constexpr = SECTION if SECTION < 64 else 64
    chunks: tl.constexpr = 64 // width
    words: tl.constexpr = width // 4
    # Where codes of a single plane stand in their bytes.
    step: tl.constexpr = BITS if BITS == 4 or BITS == 2 or BITS == 1 else 0
    shifted: tl.constexpr = CENTER > 0 or ZERO != ""
    lacking: tl.constexpr = 1.0 if TABLE else 2.0 ** (63 - BIAS) if EXPONENT > 0 else 2.0**85
    m = tl.program_id(0) % M
    if ROUTED:
        codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr = parts_of_expert(
            codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr, tl.load(blocks_ptr + m).to(tl.int64),
            N, K, row_bytes, BITS, GROUP, COARSE_GROUP, ZERO,
        )  # fmt: skip
    first_row = tl.program_id(0) // M * BN
    n = first_row + tl.arange(0, BN)
    share = tl.program_id(1)
    lane, quad = tl.arange(0, 16), tl.arange(0, BN * 4)
    above, inside = tl.arange(0, chunks)[:, None], tl.arange(0, width)[None, :]
    codes = codes_ptr.to(tl.pointer_type(tl.int32)) + lane[None, :] % words
    codes += tl.minimum(n, N - 1)[:, None].to(tl.int64) * (row_bytes // 16 * 4)
    scaled = tl.minimum(first_row + quad // 4, N - 1)
    given = x_ptr + m.to(tl.int64) * x_stride
    turns = tl.cdiv(K, chunks * PARTS * width)
    each = tl.cdiv(turns, shares)
    end = tl.cdiv(K, PARTS * width)
    total = tl.zeros((BN, 16), dtype=tl.float32)
    if GROUP == 0:
        products = tl.zeros((BN, 16), dtype=tl.float32)
        sums = tl.zeros((16,), dtype=tl.float32)
        scale, subtracted, added = group_of(
            scales_ptr, coarse_ptr, zeros_ptr, scaled, N, 0, K, CENTER, GROUP, COARSE_GROUP, SCALE, ZERO
        )
    if TABLE:
        table = tl.load(table_ptr + tl.arange(0, 1 << BITS)).to(tl.float32)
    for turn in tl.range(share * each, tl.minimum(turns, share * each + each), num_stages=STAGES):
        chunk = turn * chunks + lane // words
        at = codes + (chunk * (PARTS * width * BITS // 32))[None, :]
        mask = (chunk < end)[None, :]
        for section in tl.static_range(PARTS):
            if BITS == 8:
                word = tl.load(at, mask=mask, other=0)
            if BITS & 4 and section % 2 == 0:
                fours = tl.load(at + section // 2 * words, mask=mask, other=0)
            if BITS & 2 and section % 4 == 0:
                twos = tl.load(at + ((BITS & 4) * PARTS // 8 + section // 4) * words, mask=mask, other=0)
            if BITS & 1 and section == 0:
                ones = tl.load(at + (BITS - 1) * PARTS // 8 * words, mask=mask, other=0)
            # A section's codes, in four bytes; of one plane they stay where they are.
            if BITS == 4:
                word = fours
            elif BITS == 2:
                word = twos
            elif BITS == 1:
                word = ones
            elif BITS < 8:
                if BITS & 4:
                    word = (fours >> (section % 2 * 4)) & 0x0F0F0F0F
                    if BITS & 2:
                        word = word | (((twos >> (section % 4 * 2)) & 0x03030303) << 4)
                else:
                    word = (twos >> (section % 4 * 2)) & 0x03030303
                if BITS & 1:
                    word = word | (((ones >> section) & 0x01010101) << (BITS - 1))
            if GROUP > 0 and section % RUN == 0:
                k = ((turn * chunks + quad % 4 * 16 // width) * PARTS + section) * width
                scale, subtracted, added = group_of(
                    scales_ptr, coarse_ptr, zeros_ptr, scaled, N, tl.minimum(k, K - 1), K, CENTER, GROUP, COARSE_GROUP, SCALE, ZERO
                )  # fmt: skip
                products = tl.zeros((BN, 16), dtype=tl.float32)
                sums = tl.zeros((16,), dtype=tl.float32)
            k = ((turn * chunks + above) * PARTS + section) * width + inside
            column = tl.load(order_ptr + k, mask=k < K, other=0) if ORDERED else k
            x = tl.load(given + column, mask=k < K, other=0.0).to(tl.float32)
            evens, odds = tl.split(tl.reshape(x, (16, 2, 2)))
            first, third = tl.split(evens)
            second, fourth = tl.split(odds)
            if shifted:
                sums += (first + second) + (third + fourth)
            if TABLE:
                first_value, second_value, third_value, fourth_value = looked_up(word, table, step * section % 8, BITS)
                products += first_value * first[None, :]
                products += second_value * second[None, :]
                products += third_value * third[None, :]
                products += fourth_value * fourth[None, :]
            else:
                products += products_of(word, first, step * section % 8, BITS, EXPONENT)
                products += products_of(word, second, step * section % 8 + 8, BITS, EXPONENT)
                products += products_of(word, third, step * section % 8 + 16, BITS, EXPONENT)
                products += products_of(word, fourth, step * section % 8 + 24, BITS, EXPONENT)
            if GROUP > 0 and section % RUN == RUN - 1:
                total += products * spread(scale, BN)
                if shifted:
                    total += sums[None, :] * spread((added - scale * subtracted) * (1.0 / lacking), BN)
    if GROUP == 0:
        total = products * spread(scale, BN)
        if shifted:
            total += sums[None, :] * spread((added - scale * subtracted) * (1.0 / lacking), BN)
    result = tl.sum(total, 1) * lacking
    tl.store(out_ptr + (share * M + m).to(tl.int64) * N + n, result.to(out_ptr.dtype.element_ty), mask=n < N)
