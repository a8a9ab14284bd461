"""Inputs that are rounded before the product, by XLA: to groups of small floats, or but for outliers. The arithmetic is qcore.kernels.activations'."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qcore_tpu.kernels.form import Rounding
from qcore_tpu.kernels.numbers import SMALL, divided, power_of_two, rounded_to

_PRODUCT = 6.200124e-05
"""bitsandbytes' 1 / 127^2 (qcore.kernels.llm_int8)."""


def stands_for(x: jax.Array, rounding: Rounding, whole: jax.Array | None) -> jax.Array:
    """x [M, K] rounded and back, in its type. whole: float32 [1, 1], the scale above those of e4m3."""
    if rounding.outliers is not None:
        return _but_outliers(x, rounding.outliers).astype(x.dtype)
    columns, size = x.shape[1], rounding.group
    values = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -columns % size)))
    magnitude = jax.lax.reduce_window(jnp.abs(values), 0.0, jax.lax.max, (1, size), (1, size), "VALID")
    if rounding.scale == "e8m0":
        scale = power_of_two(magnitude, rounding.element)
    else:
        assert whole is not None, "the scale of the whole tensor is stored"
        above = jnp.broadcast_to(whole, magnitude.shape)
        fine = rounded_to(divided(divided(magnitude, SMALL[rounding.element][2]), above), "e4m3fn")
        scale = jnp.where(fine == 0, 0.125, fine) * above  # e4m3's epsilon, as the definition has it
    spread = jnp.repeat(scale, size, 1)
    back = rounded_to(divided(values, spread), rounding.element) * spread
    return back[:, :columns].astype(x.dtype)


def _but_outliers(x: jax.Array, threshold: float) -> jax.Array:
    """float32. Columns with a value of the threshold's size or more are kept; the rest of each row is rounded to float16, and to int8."""
    narrow = jax.lax.reduce_precision(x.astype(jnp.float32), 5, 10)  # float16: a cast there and back XLA leaves out
    beyond = jnp.abs(narrow) >= threshold
    inside = jnp.where(beyond, 0.0, narrow)
    absmax = jnp.max(jnp.abs(inside), 1, keepdims=True)
    codes = jnp.round(
        inside * (divided(jnp.ones_like(absmax), absmax) * 127.0)
    )  # torch's way of dividing a number by a tensor
    whole = jnp.where(absmax == 0, 0.0, codes * (absmax * (_PRODUCT * 127.0)))
    return jnp.where(jnp.any(beyond, 0), x.astype(jnp.float32), whole)
