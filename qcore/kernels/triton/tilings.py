"""The blocks that programs work on, by what an architecture offers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from qcore.discovery import registry

if TYPE_CHECKING:
    import torch

    from qcore.platform import Target


@dataclass(frozen=True)
class Tiling:
    """A program's block: rows of x, rows of the weight. For up to `most` rows of x."""

    most: int
    rows: int
    outputs: int
    warps: int
    stages: int


_ASYNCHRONOUS = (Tiling(16, 16, 128, 4, 4), Tiling(256, 64, 128, 8, 3))
"""Where loads run ahead of products into shared memory."""
_ASYNCHRONOUS_SMALL = (Tiling(16, 16, 128, 4, 3), Tiling(256, 64, 128, 8, 2))
"""The same with 99 KiB of it. 128 x 128 would spill."""
_WIDE_WARPS = (Tiling(16, 16, 64, 4, 2), Tiling(64, 64, 64, 4, 2), Tiling(256, 64, 128, 8, 2))
"""Warps of 64, and 64 KiB of shared memory."""
_NARROW_WARPS = (Tiling(16, 16, 64, 4, 2), Tiling(256, 32, 64, 8, 2))
_SCALAR = (Tiling(16, 16, 32, 8, 1),)
"""Where products are made one by one: more rows are for the vendor's dense product."""

DENSE = Tiling(1 << 30, 16, 64, 4, 1)
"""Of programs that make rows of a weight dense; they have no rows of x."""


def tilings_of(target: Target) -> tuple[Tiling, ...]:
    """From the one for the fewest rows to that for the most; beyond those a weight is made dense."""
    if not target.matrix:
        return _SCALAR
    if target.backend == "cuda":
        return _ASYNCHRONOUS if target.shared >= 160 << 10 else _ASYNCHRONOUS_SMALL
    return _WIDE_WARPS if target.warp == 64 else _NARROW_WARPS


@cache
def tilings_on(place: torch.device) -> tuple[Tiling, ...]:
    """Those of the device that torch calls so; of the CPU, where Triton's interpreter runs, the first table's."""
    for device in registry().devices():
        if device.torch_device == str(place):
            targets = registry().platforms[device.platform].targets
            if targets:
                return tilings_of(next((t for t in targets if t.architecture == device.architecture), targets[0]))
    return _ASYNCHRONOUS
