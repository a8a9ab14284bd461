"""An embedding's rows, in jax's operators: a row's parts lie together in words of 32 bits, which TPUs gather without reading others, and those rows alone are unpacked. What
codes stand for is as in the product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from qcore_tpu.kernels.form import Form
from qcore_tpu.kernels.pallas import weight_of

Part = tuple[str, tuple[int, ...], str]
"""The name of a product's part (qcore_tpu.kernels.pallas), its shape but for the outputs, and its type."""


@partial(jax.jit, static_argnames=("form", "layout", "columns", "dtype"))
def look_up(
    tokens: jax.Array, parts: Mapping[str, jax.Array], form: Form, layout: tuple[Part, ...], columns: int, dtype: str
) -> jax.Array:
    """tokens int32 [M, 1] -> rows [M, columns]. parts: `words` int32, row after row (what is not wide, XLA would lay out anew at every call were it a matrix), each row's parts as `layout` has
    them, one after the other in whole words; a word has a byte of each quarter of these bytes, the first quarter's lowest, so that no bytes have to be brought between others. `table`
    as in the product."""
    each = sum(-(-math.prod(shape) * jnp.dtype(kind).itemsize // 4) for _, shape, kind in layout)
    words = jax.vmap(lambda token: jax.lax.dynamic_slice(parts["words"], (token * each,), (each,)))(tokens[:, 0])
    held = jnp.concatenate([(words >> place & 255).astype(jnp.uint8) for place in (0, 8, 16, 24)], 1)
    found, first = {}, 0
    for name, shape, kind in layout:
        width, count = jnp.dtype(kind).itemsize, math.prod(shape)
        own = held[:, first : first + count * width]
        numbers = own if width == 1 else own.reshape(len(tokens), count, width)
        found[name] = jnp.moveaxis(jax.lax.bitcast_convert_type(numbers, kind).reshape(len(tokens), *shape), 0, -1)
        first += -(-count * width // 4) * 4
    tail, table = found.pop("tail", None), {name: part for name, part in parts.items() if name == "table"}
    found["codes"] = found["codes"].reshape(-1, form.byte_rows(form.block), len(tokens))
    rows = jax.vmap(lambda block: weight_of({**block, **table}, form))(found).reshape(-1, len(tokens))[:columns]
    return (rows if tail is None else rows * tail).T.astype(dtype)
