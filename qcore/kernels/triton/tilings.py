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
    """A program's block: rows of x, rows of the weight. For up to `most` rows of x. Of one row, products are made without a matrix unit."""

    most: int
    rows: int
    outputs: int
    warps: int
    stages: int


_VECTOR = Tiling(1, 1, 128, 4, 1)
"""A thread has 16 bytes of each of four rows, in warps of 64 of two: with fewer x costs as much as the weight, more take too many registers."""
_ASYNCHRONOUS = (_VECTOR, Tiling(16, 16, 128, 4, 4), Tiling(128, 64, 64, 4, 4))
"""Where loads run ahead of products into shared memory. Beyond 128 rows it is faster to make the weight dense first."""
_ASYNCHRONOUS_SMALL = (_VECTOR, Tiling(16, 16, 128, 4, 3), Tiling(128, 64, 64, 4, 3))
"""The same with 99 KiB of it."""
_WIDE_WARPS = (_VECTOR, Tiling(16, 16, 64, 4, 2), Tiling(64, 64, 64, 4, 2), Tiling(256, 64, 128, 8, 2))
"""Warps of 64, and 64 KiB of shared memory."""
_WIDE_WARPS_LARGE = (_VECTOR, Tiling(16, 16, 64, 4, 2), Tiling(256, 64, 64, 4, 2))
"""The same with 160 KiB of it, into which loads run ahead."""
_NARROW_WARPS = (Tiling(1, 1, 64, 4, 1), Tiling(16, 16, 64, 4, 2), Tiling(256, 32, 64, 8, 2))
_SCALAR = (_VECTOR, Tiling(16, 16, 32, 8, 1))
"""Where products are made one by one: more rows are for the vendor's dense product."""

_EIGHTS = (
    Tiling(16, 16, 128, 4, 4),
    Tiling(64, 64, 128, 4, 4),
    Tiling(256, 64, 128, 8, 4),
    Tiling(1 << 30, 128, 128, 8, 3),
)
_EIGHTS_SMALL = (Tiling(16, 16, 128, 4, 3), Tiling(64, 64, 128, 8, 2), Tiling(1 << 30, 128, 128, 8, 2))
_EIGHTS_WIDE = (Tiling(16, 16, 64, 4, 2), Tiling(1 << 30, 128, 128, 8, 2))
_EIGHTS_NARROW = (Tiling(16, 16, 64, 4, 2), Tiling(1 << 30, 64, 64, 4, 2))

DENSE = Tiling(1 << 30, 16, 64, 4, 1)
"""Of programs that make rows of a weight dense; they have no rows of x."""


def tilings_of(target: Target) -> tuple[Tiling, ...]:
    """From the one for the fewest rows to that for the most; beyond those a weight is made dense."""
    if not target.matrix:
        return _SCALAR
    if target.backend == "cuda":
        return _ASYNCHRONOUS if target.shared >= 160 << 10 else _ASYNCHRONOUS_SMALL
    if target.warp == 32:
        return _NARROW_WARPS
    return _WIDE_WARPS_LARGE if target.shared >= 160 << 10 else _WIDE_WARPS


def eights_of(target: Target) -> tuple[Tiling, ...]:
    """Of 8-bit codes times 8-bit codes, 128 columns at a time."""
    if target.backend == "cuda":
        return _EIGHTS if target.shared >= 160 << 10 else _EIGHTS_SMALL
    return _EIGHTS_WIDE if target.warp == 64 else _EIGHTS_NARROW


def eights_cast(target: Target | None) -> bool:
    """Whether Triton converts float32 to e4m3fn by one instruction, to nearest and saturating."""
    return target is not None and target.backend == "cuda" and bool(target.fp8)


@cache
def target_on(place: torch.device) -> Target | None:
    """What kernels are compiled for on the device that torch calls so; None on the CPU, where Triton's interpreter runs."""
    for device in registry().devices():
        if device.torch_device == str(place):
            targets = registry().platforms[device.platform].targets
            return next((t for t in targets if t.architecture == device.architecture), targets[0] if targets else None)
    return None


def tilings_on(place: torch.device) -> tuple[Tiling, ...]:
    """Those of the device that torch calls so."""
    if target := target_on(place):
        return tilings_of(target)
    # Whether a device that nothing is known of keeps numbers below the smallest normal one is not known either: it gets no vectors (vector.py).
    return _ASYNCHRONOUS if place.type == "cpu" else _ASYNCHRONOUS[1:]


def eights_on(place: torch.device) -> tuple[Tiling, ...]:
    """The same of products of 8 bits."""
    target = target_on(place)
    return eights_of(target) if target else _EIGHTS
