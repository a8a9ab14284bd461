"""Rows of a mixture's experts, brought into blocks of which each belongs to one expert, so that one product takes them all: shapes do not depend on which experts were chosen."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qcore_tpu.kernels.form import FEWEST


@dataclass(frozen=True)
class Blocks:
    """owner: int32 [blocks], the expert of each; of blocks beyond those that are `used`, int32 [1], that of the last one. source: int32 [blocks * rows], the row of x that comes to each
    place; any, where a block is not full. place: int32 [M], where each row of x came to."""

    owner: jax.Array
    used: jax.Array
    source: jax.Array
    place: jax.Array


def rows_of_block(rows: int, count: int, most: int) -> int:
    """About as many as an expert has of so many rows, but no more than `most`."""
    return min(most, max(FEWEST, 1 << (-(-rows // count) - 1).bit_length()))


def blocks_of(experts: jax.Array, count: int, size: int) -> Blocks:
    """experts: int32 [M], below `count`, in ascending order. size: rows of a block."""
    rows, chosen = len(experts), min(len(experts), count)
    blocks = chosen + (rows - chosen) // size  # as many as there are at most
    counts = jnp.sum(experts[:, None] == jnp.arange(count), 0, dtype=jnp.int32)
    own = -(-counts // size)
    beyond, first_row = jnp.cumsum(own), jnp.cumsum(counts) - counts
    first_block = beyond - own
    each = jnp.arange(blocks, dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(each[:, None] >= beyond, 1, dtype=jnp.int32), experts[-1])
    source = (first_row[owner] + (each - first_block[owner]) * size)[:, None] + jnp.arange(size)
    place = first_block[experts] * size + jnp.arange(rows) - first_row[experts]
    return Blocks(owner, beyond[-1:], jnp.minimum(source, rows - 1).flatten(), place)
