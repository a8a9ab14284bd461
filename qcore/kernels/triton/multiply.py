"""Decoding codes and multiplying them, as Triton compiles it: the one loop that all kernels of weights in planes are made of.

What is multiplied is what a code stands for before it is scaled: a whole number, a small float or a table's entry. Matrix units sum products in
float32; a sum of at most 64 columns, none of them of another group, is scaled before it is added to the others, so that the weight itself is never
rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcore.kernels.triton.routing import place_of


@triton.jit  # type: ignore[untyped-decorator]
def value_of(raw, zero, table_ptr, dtype: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, BIAS: tl.constexpr, TABLE: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """What codes stand for before they are scaled. raw: int32, the code SHIFT bits up, all other bits zero, but of integers those of the float32
    2^23, below which a float's bits are whole numbers. zero: float32, subtracted from integers."""
    if TABLE:
        value = tl.load(table_ptr + (raw >> SHIFT)).to(dtype)
    elif EXPONENT > 0:
        # Sign and magnitude where float32 has its own, the exponent as it is: too small by a power of two.
        bits = ((raw << (32 - BITS - SHIFT)) >> (8 - EXPONENT)) & (
            -(1 << 31) | ((1 << (BITS - 1)) - 1) << (24 + EXPONENT - BITS)
        )
        value = (bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))).to(dtype)
    else:
        # 2^23 + q, as its bits are: no conversion, and the shift is a factor of a multiplication and addition.
        lifted = raw.to(tl.float32, bitcast=True)
        value = (lifted * (1.0 / (1 << SHIFT)) - (8388608.0 / (1 << SHIFT) + zero)).to(dtype)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def scale_of(pointers, mask, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 scales."""
    if SCALE == "e8m0":
        exponents = tl.load(pointers, mask=mask, other=127).to(tl.int32)
        bits = tl.where(exponents == 0, 0x00400000, tl.where(exponents == 255, 0x7FC00000, exponents << 23))
        scale = bits.to(tl.float32, bitcast=True)
    elif SCALE == "e4m3fn":
        stored = tl.load(pointers, mask=mask, other=0).to(tl.int32)
        bits = ((stored & 0x80) << 24) | ((stored & 0x7F) << 20)
        number = bits.to(tl.float32, bitcast=True) * (2.0**120)
        scale = tl.where((stored & 0x7F) == 0x7F, float("nan"), number)
    else:
        scale = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def group_of(  # type: ignore[no-untyped-def]
    scales_ptr, coarse_ptr, zeros_ptr, n, N, k, K,
    CENTER: tl.constexpr, GROUP: tl.constexpr, COARSE_GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Of rows n and the group of column k, float32 [BN] each: the scale, what is subtracted from codes, and what is added to scaled ones."""
    mask = n < N
    place = n if GROUP == 0 else n + k // GROUP * N
    scale = scale_of(scales_ptr + place, mask, SCALE)
    subtracted, added = tl.zeros_like(scale) + CENTER, tl.zeros_like(scale)
    if COARSE_GROUP > 0:
        coarse = coarse_ptr + n + k // COARSE_GROUP * N
        scale *= tl.load(coarse, mask=mask, other=0.0).to(tl.float32)
    if ZERO == "stored":
        subtracted += tl.load(zeros_ptr + place, mask=mask, other=0).to(tl.float32)
    if ZERO == "added":
        added = tl.load(zeros_ptr + place, mask=mask, other=0).to(tl.float32)
        if COARSE_GROUP > 0:
            added *= tl.load(coarse + tl.cdiv(K, COARSE_GROUP) * N, mask=mask, other=0.0).to(tl.float32)
    return scale, subtracted, added


@triton.jit  # type: ignore[untyped-decorator]
def parts_of_expert(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr, expert, N, K, row_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, COARSE_GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Pointers to the parts of one of a stack's weights. expert: int64."""
    groups = 1 if GROUP == 0 else tl.cdiv(K, GROUP)
    codes_ptr += expert * N * row_bytes
    scales_ptr += expert * groups * N
    if COARSE_GROUP > 0:
        coarse_ptr += expert * tl.cdiv(K, COARSE_GROUP) * (2 if ZERO == "added" else 1) * N
    zeros_ptr += expert * groups * N
    table_ptr += expert * (1 << BITS)
    order_ptr += expert * K
    return codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr


@triton.jit(do_not_specialize=("M", "shares"))  # type: ignore[untyped-decorator]
def multiply_codes(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr, blocks_ptr, out_ptr,
    M, N, K, start, x_stride, row_bytes, shares,
    BITS: tl.constexpr, CENTER: tl.constexpr, EXPONENT: tl.constexpr, BIAS: tl.constexpr, TABLE: tl.constexpr, GROUP: tl.constexpr,
    COARSE_GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr, SECTION: tl.constexpr,
    RUN: tl.constexpr, DENSE: tl.constexpr, ROUTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [shares, M, N] of x [M, K]; where DENSE, out [.., K] is the weight itself from row `start` on, and x is not looked at.

    Where ROUTED, parts are stacked, one of each for an expert, and blocks says which rows of x meet which (qcore.kernels.triton.routing).
    codes: [N, row_bytes] in planes. scales, zeros: [groups, N]. coarse: [1 or 2, coarse groups, N], the second for zeros that are
    added. order: int32 [K], which columns of x the codes stand for. SECTION divides GROUP, the columns under one scale, or 0: all; TOGETHER sections share the bytes of
    the widest plane, and RUN of them in a row a group. Scales that all columns have multiply the whole sum. The weight is the product's left
    side, which matrix units take from the registers that it was decoded in."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Codes of a single plane stay where they are in their bytes; value_of says what lift is for.
    step: tl.constexpr = BITS if BITS == 4 or BITS == 2 or BITS == 1 else 0
    lift: tl.constexpr = 0 if TABLE or EXPONENT > 0 else 0x4B000000
    begin, end, expert, across = place_of(blocks_ptr, M, tl.cdiv(N, BN), BM, ROUTED)
    if ROUTED:
        if begin >= end:
            return
        codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr = parts_of_expert(
            codes_ptr, scales_ptr, coarse_ptr, zeros_ptr, table_ptr, order_ptr, expert, N, K, row_bytes, BITS, GROUP, COARSE_GROUP, ZERO
        )  # fmt: skip
    m = begin + tl.arange(0, BM)
    n = start + across * BN + tl.arange(0, BN)
    share = tl.program_id(1)
    inside = tl.arange(0, SECTION)
    row = codes_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * row_bytes + inside[None, :]
    given = x_ptr + m.to(tl.int64) * x_stride
    turns = tl.cdiv(K, TOGETHER * SECTION)
    each = tl.cdiv(turns, shares)
    total = tl.zeros((BN, BM), dtype=tl.float32)
    sums = tl.zeros((BM,), dtype=tl.float32)
    scale, subtracted, added = group_of(
        scales_ptr, coarse_ptr, zeros_ptr, n, N, 0, K, CENTER, GROUP, COARSE_GROUP, SCALE, ZERO
    )
    for turn in range(share * each, tl.minimum(turns, share * each + each)):
        # The codes of the turn's first section come lowest in every plane's bytes.
        first = turn * TOGETHER % PARTS
        at = row + turn * TOGETHER // PARTS * (PARTS * SECTION * BITS // 8)
        if BITS == 8:
            eights = tl.load(at).to(tl.int32) | lift
        if BITS & 4:
            fours = tl.load(at + first // 2 * SECTION).to(tl.int32)
        if BITS & 2:
            twos = tl.load(at + ((BITS & 4) * PARTS // 8 + first // 4) * SECTION).to(tl.int32) >> (first % 4 * 2)
        if BITS & 1:
            ones = tl.load(at + (BITS - 1) * PARTS // 8 * SECTION).to(tl.int32) >> first
        if BITS == 4:
            fours = fours | lift
        if BITS == 2:
            twos = twos | lift
        if BITS == 1:
            ones = ones | lift
        for section in tl.static_range(TOGETHER):
            if BITS == 8:
                raw = eights
            elif BITS == 4:
                raw = fours & (lift | 15 << (4 * section))
            elif BITS == 2:
                raw = twos & (lift | 3 << (2 * section))
            elif BITS == 1:
                raw = ones & (lift | 1 << section)
            else:
                if BITS & 4:
                    raw = (fours >> (4 * section)) & 15
                    if BITS & 2:
                        raw = raw | (((twos >> (2 * section)) & 3) << 4)
                else:
                    raw = (twos >> (2 * section)) & 3
                if BITS & 1:
                    raw = raw | (((ones >> section) & 1) << (BITS - 1))
                raw = raw | lift
            k = (turn * TOGETHER + section) * SECTION
            if GROUP > 0 and section % RUN == 0:
                scale, subtracted, added = group_of(
                    scales_ptr, coarse_ptr, zeros_ptr, n, N, tl.minimum(k, K - 1), K, CENTER, GROUP, COARSE_GROUP, SCALE, ZERO
                )  # fmt: skip
            k += inside
            column = tl.load(order_ptr + k, mask=k < K, other=0) if ORDERED else k
            if DENSE:
                values = (
                    value_of(
                        raw, subtracted[:, None], table_ptr, tl.float32, step * section, BITS, EXPONENT, BIAS, TABLE
                    )
                    * scale[:, None]
                )
                dense = out_ptr + (n - start)[:, None].to(tl.int64) * K + column[None, :]
                values = (values + added[:, None]).to(out_ptr.dtype.element_ty)
                tl.store(dense, values, mask=(n[:, None] < N) & (k[None, :] < K))
            else:
                x = tl.load(given[:, None] + column[None, :], mask=(m[:, None] < end) & (k[None, :] < K), other=0.0)
                weight = value_of(
                    raw, subtracted[:, None], table_ptr, dtype, step * section, BITS, EXPONENT, BIAS, TABLE
                )
                if GROUP == 0:
                    total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
                    if ZERO == "added":
                        sums += tl.sum(x.to(tl.float32), 1)
                else:
                    if section % RUN == 0:
                        products = tl.dot(weight, tl.trans(x), input_precision="ieee")
                    else:
                        products = tl.dot(weight, tl.trans(x), products, input_precision="ieee")
                    if section % RUN == RUN - 1:
                        total += products * scale[:, None]
                    if ZERO == "added":
                        total += tl.sum(x.to(tl.float32), 1)[None, :] * added[:, None]
    if not DENSE:
        if GROUP == 0:
            total = total * scale[:, None] + sums[None, :] * added[:, None]
        out = out_ptr + (share * M + m[None, :]).to(tl.int64) * N + n[:, None]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[None, :] < end) & (n[:, None] < N))
