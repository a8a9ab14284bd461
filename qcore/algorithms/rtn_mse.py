"""Rounding to nearest under the scales of least squared error, which may cut a group's largest weights off."""

from __future__ import annotations

import torch

from qcore.algorithms.grids import fit
from qcore.algorithms.rtn import rounded
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor


def rtn_mse(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight: float [N, K]. Scales of integers are float16 where that holds them. Raises Refused (scheme-unsupported)."""
    return rounded(weight, scheme, torch.ones(weight.shape[1]), fit)
