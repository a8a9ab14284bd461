"""From numbers to blocks: the inverse of `dequantize`.

The simple types follow ggml's formulas bit for bit where no importance is given. Everything else is a search for the
least weighted squared error (see `quantize_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.blocks import quantize_iq, quantize_kquants, quantize_lookup, quantize_simple
from qcore.blocks.types import BLOCK_TYPES, BlockType

_REFERENCE: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {**quantize_simple.REFERENCE, **quantize_lookup.REFERENCE}
)
_SEARCH: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {**quantize_simple.SEARCH, **quantize_kquants.SEARCH, **quantize_lookup.SEARCH, **quantize_iq.SEARCH}
)

_PIECE_CPU, _PIECE = 1 << 18, 1 << 22
"""Elements that are encoded at once, so that memory stays bounded: what a CPU's cache holds, or what fills a device."""
_BY_MAGNITUDE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"})
"""Types so coarse that, with no importance given, the weights' magnitudes serve in its place."""
_LEAST_IMPORTANCE = 1e-4
"""Of the mean: a channel that the calibration never reached is still stored."""


def quantize_blocks(type_name: str, rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Blocks of type `type_name` (a key of BLOCK_TYPES) that stand for `rows` as nearly as may be.

    rows: floating point [R, K] on any device, finite, K whole blocks. importance: float32 [K], the mean square of the
    activation that each column meets. Returns uint8 [R, K / elements * nbytes] on the same device. An error counts as
    much as its column's importance, and somewhat more in larger weights, as llama.cpp has it. Raises ValueError for
    anything else.
    """
    block = _checked(type_name, rows, importance)
    out = torch.empty(
        rows.shape[0], rows.shape[1] // block.elements * block.nbytes, dtype=torch.uint8, device=rows.device
    )
    if not out.numel():
        return out
    if importance is not None:
        importance = _normal(importance.to(rows.device, torch.float32))
    step = max(1, (_PIECE_CPU if rows.device.type == "cpu" else _PIECE) // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        piece = rows[start : start + step].float()
        if not piece.isfinite().all():
            raise ValueError(f"rows {start} to {start + len(piece) - 1} hold values that are infinite or NaN")
        out[start : start + step] = _encode(block, piece, importance).view(len(piece), out.shape[1])
    return out


def _encode(block: BlockType, rows: Tensor, importance: Tensor | None) -> Tensor:
    blocks = rows.reshape(-1, block.elements)
    if importance is None and block.name in _REFERENCE:
        return _REFERENCE[block.name](blocks)
    unit = blocks.abs().amax(1, keepdim=True)
    unit.masked_fill_(unit == 0, 1)
    x = blocks / unit
    w = torch.ones_like(x)
    if block.name != "q1_0" and (importance is not None or block.name in _BY_MAGNITUDE):
        # llama.cpp's weights: large weights matter more than the mean square of the activations alone tells.
        squares = x.square()
        w = (squares + 2 * squares.mean(1, keepdim=True)).sqrt_()
    if importance is not None:
        w = (w.view_as(rows) * importance).view_as(x)
    return _SEARCH[block.name](x, w, unit)


def _normal(importance: Tensor) -> Tensor:
    """Relative to the mean, and nowhere near zero."""
    mean = importance.double().mean()
    if mean == 0:
        return torch.ones_like(importance)
    return (importance.double() / mean).clamp_(_LEAST_IMPORTANCE).float()


def _checked(type_name: str, rows: Tensor, importance: Tensor | None) -> BlockType:
    block = BLOCK_TYPES.get(type_name)
    if block is None:
        raise ValueError(f"unknown block type {type_name!r}: one of {', '.join(BLOCK_TYPES)}")
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"rows must be floating point [R, K], not {rows.dtype} {list(rows.shape)}")
    if rows.shape[1] % block.elements:
        raise ValueError(f"rows of {rows.shape[1]} values are not whole {type_name} blocks of {block.elements}")
    if importance is not None:
        if importance.shape != rows.shape[1:]:
            raise ValueError(f"importance must be [{rows.shape[1]}], one value a column, not {list(importance.shape)}")
        if not (importance.isfinite() & (importance >= 0)).all():
            raise ValueError("importance must be finite and not negative")
    return block
