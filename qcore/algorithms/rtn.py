"""Round to nearest: every weight becomes the nearest code under a scale that spans its group's range."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qcore.algorithms.grids import Fit, Grid, columns_of_a_scale, grid_of
from qcore.algorithms.put_together import quantized_tensor
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor


def rtn(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight: float [N, K]. Symmetric integers span [-max, max] with 2^bits - 1 steps, asymmetric ones [min(0, min), max(0, max)],
    under float16 scales, as most formats have them; floats map the largest magnitude to their largest value.

    Raises Refused (scheme-unsupported).
    """
    alike = torch.ones(weight.shape[1])
    return rounded(weight, scheme, alike, lambda grid, values, importance: grid.span(values))


def rounded(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor, find: Callable[[Grid, torch.Tensor, torch.Tensor], Fit]
) -> QuantizedTensor:  # fmt: skip
    """The nearest codes under the scales that `find` gives for each group: its columns [g, N], and their importance, part of [K] or [K, K]."""
    weight = weight.to(torch.float32)
    grid, size = (
        grid_of(scheme.weight, weight),
        columns_of_a_scale(scheme.weight.scales[0].granularity, weight.shape[1]),
    )
    groups = weight.T.contiguous().split(size)
    parts = importance.split(size)
    if importance.dim() == 2:
        parts = tuple(part[:, at * size : at * size + size] for at, part in enumerate(parts))
    fits = [find(grid, group, part) for group, part in zip(groups, parts, strict=True)]
    units = torch.cat([grid.nearest(group, fit) for group, fit in zip(groups, fits, strict=True)])
    scale, zero = (torch.cat([getattr(fit, part) for fit in fits]).T.contiguous() for part in ("scale", "zero"))
    return quantized_tensor(scheme, grid, units.T.contiguous(), scale, zero)
