"""What codes stand for, in jax's operators on vectors of int32 and float32, which every TPU has; all of it runs within the product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qcore_tpu.kernels.form import Form


def codes_of(rows: jax.Array, form: Form) -> jax.Array:
    """A block's bytes [bytes, N] -> codes int32 [columns, N]."""
    wide = rows.astype(jnp.int32)
    found: jax.Array | None = None
    first = below = 0
    for width in form.widths:
        plane = wide[first : first + form.block * width // 8]
        mask = (1 << width) - 1
        parts = [plane if width == 8 else (plane >> shift) & mask for shift in range(0, 8, width)]
        codes = jnp.concatenate(parts, 0) if len(parts) > 1 else parts[0]
        found = codes if found is None else found | (codes << below)
        first, below = first + len(plane), below + width
    assert found is not None
    return found


def numbers_of(codes: jax.Array, form: Form, table: jax.Array | None) -> jax.Array:
    """float32, before zero points and scales."""
    if table is not None:
        return _looked_up(codes, form.bits, [table[0, place] for place in range(1 << form.bits)])
    if form.exponent:
        return small_float(codes, form.bits, form.exponent, form.bias)
    return (codes - form.center if form.center else codes).astype(jnp.float32)


def tuples_of(rows: jax.Array, grid: jax.Array, form: Form) -> jax.Array:
    """A block's words, their low bytes and then their high ones [bytes, N], N whole vectors -> float32 [columns, N]: the first of all tuples, the second of all, and so on. A word is
    a place in the grid (int32 [places / 128, 128]), and above it signs. Of eleven bits: whole numbers -1, 0, 1 and an eighth, which one sign is for, all times eight. Else
    8, 25, 43 with signs, of which seven make an even number with the eighth."""
    wide = rows.astype(jnp.int32)
    words = wide[: len(wide) // 2] | (wide[len(wide) // 2 :] << 8)
    parts = [_entries(words[:, start : start + 128], grid, form.tuples) for start in range(0, words.shape[1], 128)]
    entries = jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]
    signs, found = words >> form.tuples, []
    if form.tuples == 9:
        odd = signs ^ (signs >> 4)
        odd = odd ^ (odd >> 2)
        signs = signs | (((odd ^ (odd >> 1)) & 1) << 7)
    for place in range(8):
        code = (entries >> (2 * place)) & 3
        if form.tuples == 11:
            found.append(8 * (code - 1) + jnp.where(signs != 0, -1, 1))
        else:
            size = jnp.where(code == 0, 8, jnp.where(code == 1, 25, 43))
            found.append(jnp.where((signs >> place) & 1 != 0, -size, size))
    return jnp.concatenate(found, 0).astype(jnp.float32)


def _entries(words: jax.Array, grid: jax.Array, bits: int) -> jax.Array:
    """Of words [tuples, 128] the grid's entries: each of its rows is looked up, and the place's upper bits choose."""
    column = words & 127
    rows = [jnp.broadcast_to(grid[row : row + 1, :], words.shape) for row in range(grid.shape[0])]
    found = [jnp.take_along_axis(row, column, axis=1, mode="promise_in_bounds") for row in rows]
    return _looked_up(words >> 7, bits - 7, found)


def small_float(codes: jax.Array, bits: int, exponent: int, bias: int) -> jax.Array:
    """Sign, exponent and mantissa moved to their places in a float32. Where the exponent is 0 there is no one before the mantissa: it is taken off again, for TPUs take
    float32's own numbers of that kind for 0."""
    mantissa = bits - 1 - exponent
    size = codes & ((1 << (bits - 1)) - 1)
    moved = _float((size << (23 - mantissa)) + ((127 - bias) << 23))
    least = 2.0 ** (1 - bias)
    value = jnp.where(size < (1 << mantissa), 2.0 * moved - least, moved)
    return jnp.where(codes >> (bits - 1) != 0, -value, value)


SMALL = {"e4m3fn": (3, -6, 448.0), "e2m1": (1, 0, 6.0)}
"""Bits of mantissa, the least exponent, and the largest number."""


def rounded_to(values: jax.Array, element: str) -> jax.Array:
    """float32 rounded to a small float's nearest number, ties to even; saturates."""
    mantissa, least, largest = SMALL[element]
    clamped = jnp.clip(values, -largest, largest)
    exponent = jnp.maximum((_bits(clamped) >> 23) & 255, 127 + least)
    step, inverse = _float((exponent - mantissa) << 23), _float((254 + mantissa - exponent) << 23)
    return jnp.round(clamped * inverse) * step


def power_of_two(magnitude: jax.Array, element: str) -> jax.Array:
    """The scale of an MX group (qcore.kernels.minifloat, e8m0): the exponent of its largest magnitude, rounded to the element's mantissa, less the element's own."""
    carried = _bits(magnitude) + (1 << 21)
    largest = (_bits(jnp.float32(SMALL[element][2])) >> 23) - 127
    return _float(jnp.clip((carried >> 23) - largest, 1, 254) << 23)


def divided(values: jax.Array, by: jax.Array | float) -> jax.Array:
    """values / by in float32, rounded once: a last bit decides which way halves fall. TPUs and XLA multiply by a reciprocal, so that what is left over, found exactly by
    products of halves of both, is divided once more."""
    divisor = jnp.full_like(values, by) if isinstance(by, float) else by
    inverse = 1.0 / divisor
    quotient = values * inverse
    (high, low), (upper, lower) = _halves(quotient), _halves(divisor)
    left = (((values - high * upper) - high * lower) - low * upper) - low * lower
    return quotient + left * inverse


def _halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper twelve bits of float32's mantissa, and the rest."""
    high = _float(_bits(values) & -4096)
    return high, values - high


def _looked_up(codes: jax.Array, bits: int, values: list[jax.Array]) -> jax.Array:
    """By the bits of the code, from the lowest: each halves what may be meant."""
    found: list[jax.Array] = values
    for bit in range(bits):
        odd = (codes >> bit) & 1 != 0
        found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.int32)
