"""From torch to jax and back: tensors of torchax are jax's arrays already; in torch-xla's graphs jax's functions become nodes (qcore_tpu.lazy); tensors of a CPU, which stands in
for a TPU, share their memory by DLPack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

_FEWEST, _MOST = 16, 512
"""Rows that fewer are filled up to, and what more are filled up to multiples of."""


def call(
    function: Callable[..., Any],
    x: torch.Tensor,
    parts: Mapping[str, torch.Tensor],
    *,
    fill: bool = True,
    **static: Any,
) -> torch.Tensor:
    """function(x, parts, **static), a function of jax's, as torch's. fill: x is [M, K], and may have more rows than are looked at."""
    if is_array(x):
        from torchax.interop import call_jax

        found: torch.Tensor = call_jax(partial(function, **static), x, dict(parts))
        return found
    if x.device.type == "xla":
        from qcore_tpu import lazy

        return lazy.call(function, x, parts, **static)
    import jax.numpy as jnp

    rows = len(x)
    given = torch.nn.functional.pad(x, (0, 0, 0, bucket(rows) - rows)) if fill else x
    arrays = {name: jnp.from_dlpack(part.contiguous()) for name, part in parts.items()}
    made: torch.Tensor = torch.utils.dlpack.from_dlpack(function(jnp.from_dlpack(given.contiguous()), arrays, **static))
    return made[:rows] if fill else made


def is_array(x: torch.Tensor) -> bool:
    """Whether it is one of torchax's."""
    return type(x).__module__.startswith("torchax.")


def bucket(rows: int) -> int:
    """The number of rows that so many are filled up to, so that few programs are compiled: a power of two, or a multiple of 512."""
    if rows > _MOST:
        return -(-rows // _MOST) * _MOST
    return max(_FEWEST, 1 << (rows - 1).bit_length())
