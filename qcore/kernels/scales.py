"""Scales and zero points as kernels have them: by group of columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import FlatGroup, Granularity, Group, Tile

if TYPE_CHECKING:
    from qcore.tensor import QuantizedTensor


def by_group(part: torch.Tensor, grid: Granularity | None, rows: int) -> torch.Tensor:
    """Scales or zero points of a weight [rows, K] as the product has them: [groups, N]. Float64 stands for numbers that no narrower type holds; their
    nearest float32 is taken."""
    part = part.to(torch.float32) if part.dtype == torch.float64 else part
    if isinstance(grid, Tile):
        part = part.repeat_interleave(min(grid.rows, rows), 0)[:rows]
    if isinstance(grid, FlatGroup):
        part = part.view(rows, -1)
    return part.expand(rows, -1).t().contiguous()


def group_size(grid: Granularity | None) -> int:
    """Columns under one scale; 0 where rows have one."""
    if isinstance(grid, Group | FlatGroup):
        return grid.size
    return grid.cols if isinstance(grid, Tile) else 0


def finest_scales(weight: QuantizedTensor) -> torch.Tensor:
    """float32, in the shape of the finest level, the others multiplied in."""
    (fine, *others), stored = weight.scheme.weight.scales, weight.scales
    if fine.type == "e8m0":
        found = stored[0].view(torch.float8_e8m0fnu).to(torch.float32)
    elif fine.type == "dynamic8":
        assert weight.scale_table is not None, "a nested codebook travels with its tensor"
        found = weight.scale_table[stored[0].int()]
    else:
        found = stored[0].to(torch.float32)
    for level, coarse in zip(others, stored[1:], strict=True):
        wide = coarse.to(torch.float32)
        if isinstance(level.granularity, FlatGroup):  # counts weights, where scales are counted here
            wide = wide.repeat_interleave(level.granularity.size // group_size(fine.granularity), -1)
            wide = wide[..., : found.numel()].reshape(found.shape)
        found = found * wide
    return found if weight.offset is None else found + weight.offset
