"""Keys and values as bytes and back, in jax's operators, which XLA makes one pass of each. The arithmetic is qcore.kernels.kv_cache's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from qcore_tpu.kernels.numbers import divided, rounded_to

_MOST = {"int8": 127.0, "e4m3fn": 448.0}
_TINY = float(jnp.finfo(jnp.float32).tiny)


@partial(jax.jit, static_argnames=("element",))
def encode(states: jax.Array, parts: Mapping[str, jax.Array], element: str) -> jax.Array:
    """[..., head_dim] -> uint8 rows. parts: `scale` float32, of any shape that spreads over the states, or none, where each row's own four bytes follow its codes; `zero`
    alike; `inverse`, what states are multiplied by instead."""
    wide = states.astype(jnp.float32)
    scale = parts.get("scale")
    if scale is None:
        scale = jnp.maximum(divided(jnp.max(jnp.abs(wide), -1, keepdims=True), _MOST[element]), _TINY)
    scaled = wide * parts["inverse"] if "inverse" in parts else divided(wide, jnp.broadcast_to(scale, wide.shape))
    if element == "int8":
        codes = jnp.clip(jnp.round(scaled) + parts.get("zero", 0.0), -128, 127).astype(jnp.int8)
    else:
        codes = rounded_to(scaled, element).astype(jnp.float8_e4m3fn)
    rows = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    if "scale" in parts:
        return rows
    return jnp.concatenate([rows, jax.lax.bitcast_convert_type(scale, jnp.uint8).reshape(*rows.shape[:-1], 4)], -1)


@partial(jax.jit, static_argnames=("element", "dtype"))
def decode(rows: jax.Array, parts: Mapping[str, jax.Array], element: str, dtype: str) -> jax.Array:
    """The numbers that the rows stand for."""
    scale = parts.get("scale")
    if scale is None:
        rows, tail = rows[..., :-4], rows[..., -4:]
        scale = jax.lax.bitcast_convert_type(tail, jnp.float32)[..., None]
    kind = jnp.int8 if element == "int8" else jnp.float8_e4m3fn
    wide = jax.lax.bitcast_convert_type(rows, kind).astype(jnp.float32)
    return ((wide - parts.get("zero", 0.0)) * scale).astype(dtype)
