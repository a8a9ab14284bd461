"""Rounding to nearest under the scales of least squared error, which may cut a group's largest weights off."""

from __future__ import annotations

import torch

from qcore.algorithms.grids import IntegerGrid, columns_of_a_scale, integer_tensor
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor


def rtn_mse(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight: float [N, K]. Scales are float16 where that holds them. Raises Refused (shape-unsupported) where groups do not divide K."""
    rows, columns = weight.shape
    size = columns_of_a_scale(scheme.weight.scales[0].granularity, columns, "rtn-mse")
    grid, alike = IntegerGrid.of(scheme.weight), torch.ones(size, 1)
    groups = [group.T.contiguous() for group in weight.to(torch.float32).split(size, 1)]
    fits = [grid.fit(group, alike) for group in groups]
    codes = torch.cat([grid.codes(group, fit) for group, fit in zip(groups, fits, strict=True)])
    scale, zero = (
        torch.cat(parts).T.contiguous() for parts in zip(*((fit.scale, fit.zero) for fit in fits), strict=True)
    )
    return integer_tensor(scheme, (rows, columns), codes.T.to(torch.uint8).contiguous(), scale, zero, None)
