"""What the text of a compiled program says that it moves, of programs whose bytes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qcore_tpu.ahead import placed
from qcore_tpu.chips import chip
from qcore_tpu.kernels.form import Form, block_of
from qcore_tpu.kernels.pallas import product
from qcore_tpu.traffic import laid_out_anew, traffic

V5E = chip("v5e")
LARGE = ((8192, 4096), jnp.bfloat16)
BYTES = 8192 * 4096 * 2


def text(function: Callable[..., Any], *given: tuple[tuple[int, ...], Any], donate: tuple[int, ...] = ()) -> str:
    place = placed(V5E.topology)
    arrays = [jax.ShapeDtypeStruct(*one, sharding=place) for one in given]
    found: str = jax.jit(function, out_shardings=place, donate_argnums=donate).lower(*arrays).compile().as_text()
    return found


@pytest.mark.parametrize(
    ("function", "given", "expected"),
    [
        (lambda x: x + 1, [LARGE], 2 * BYTES),
        (lambda x, y: x + y, [LARGE, LARGE], 3 * BYTES),
        (lambda x: x.sum(1), [LARGE], BYTES),
        (lambda x, y: y @ x, [LARGE, ((16, 8192), jnp.bfloat16)], BYTES),
        (lambda x: x[:, 128:256] + 1, [LARGE], BYTES // 16),
    ],
    ids=["each", "both", "sums", "product", "slice"],
)
def test_arrays_are_read_and_written_once(function: Callable[..., Any], given: list[Any], expected: int) -> None:
    assert expected <= traffic(text(function, *given)) <= 1.01 * expected


def test_of_what_is_looked_up_or_written_in_place_that_alone_is_moved() -> None:
    row, place = ((1, 4096), jnp.bfloat16), ((), jnp.int32)
    looked_up = text(lambda x, place: jax.lax.dynamic_slice(x, (place, 0), (1, 4096)) * 2, LARGE, place)
    assert 4096 * 2 <= traffic(looked_up) < 0.01 * BYTES

    def written(x: jax.Array, row: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(x, row * 2, (place, 0))

    assert traffic(text(written, LARGE, row, place, donate=(0,))) < 0.01 * BYTES
    assert traffic(text(written, LARGE, row, place)) > 2 * BYTES  # a copy


def test_rows_that_are_no_whole_vectors_are_laid_out_anew() -> None:
    """For Pallas; why layers' outputs are filled up."""
    form = Form(8, block_of(1536, 8, 0))
    for outputs, anew in ((576, True), (640, False)):
        parts = {"codes": ((1536, outputs), jnp.int8), "tail": ((1, outputs), jnp.float32)}
        found = text(
            lambda x, codes, tail: product(x, {"codes": codes, "tail": tail}, form, V5E),
            ((1, 1536), jnp.bfloat16),
            *parts.values(),
        )
        assert (laid_out_anew(found) >= 1536 * outputs) == anew and (anew or laid_out_anew(found) < 1 << 14)
        assert 1536 * outputs <= traffic(found)


def test_keys_and_values_are_read_in_attention() -> None:
    """Which XLA puts into operations within others."""
    keys, query = ((3, 64, 65536), jnp.bfloat16), ((3, 3, 64), jnp.bfloat16)

    def attention(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(query @ keys, axis=-1)
        return scores @ values.swapaxes(1, 2)

    held = 2 * 3 * 64 * 65536 * 2
    assert held <= traffic(text(attention, query, keys, keys)) <= 1.2 * held


def test_loops_are_not_counted() -> None:
    loop = text(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y + y.mean(), x), LARGE)
    with pytest.raises(ValueError, match="whose bytes are not known"):
        traffic(loop)
