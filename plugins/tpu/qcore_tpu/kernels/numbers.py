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


def small_float(codes: jax.Array, bits: int, exponent: int, bias: int) -> jax.Array:
    """Sign, exponent and mantissa moved to their places in a float32. Where the exponent is 0 there is no one before the mantissa: it is taken off again, for TPUs take
    float32's own numbers of that kind for 0."""
    mantissa = bits - 1 - exponent
    size = codes & ((1 << (bits - 1)) - 1)
    moved = _float((size << (23 - mantissa)) + ((127 - bias) << 23))
    least = 2.0 ** (1 - bias)
    value = jnp.where(size < (1 << mantissa), 2.0 * moved - least, moved)
    return jnp.where(codes >> (bits - 1) != 0, -value, value)


def rounded_e4m3(values: jax.Array) -> jax.Array:
    """float32 rounded to e4m3's nearest number, ties to even; saturates at 448."""
    clamped = jnp.clip(values, -448.0, 448.0)
    exponent = jnp.maximum((_bits(clamped) >> 23) & 255, 127 - 6)
    step, inverse = _float((exponent - 3) << 23), _float((254 + 3 - exponent) << 23)
    return jnp.round(clamped * inverse) * step


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
