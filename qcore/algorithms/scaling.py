"""Factors of a layer's columns: its weights are multiplied by them, and what makes its inputs is divided, which leaves outputs as they are until either is rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from qcore.algorithms.grids import largest_of, whole_scale
from qcore.algorithms.rtn import rtn
from qcore.algorithms.seen import Seen
from qcore.elements import Float
from qcore.scheme import Scheme, TensorScheme

Rounds = Callable[[torch.Tensor, float], torch.Tensor]
"""What a scheme's inputs [rows, K] become, where the largest magnitude of all of them is known."""
_ROWS = 512
"""Of a weight that the search looks at, evenly spread."""


def least_error(
    candidates: Iterable[torch.Tensor], weight: torch.Tensor, scheme: Scheme, seen: Seen, rounds: Rounds | None
) -> torch.Tensor:
    """The factors [K] under which outputs have the least error once weights [N, K] are rounded to nearest and inputs by `rounds`; ones where none is better."""
    weight = weight[:: -(-len(weight) // _ROWS)].to(torch.float32)
    best = torch.ones(weight.shape[1])
    least = _error(best, weight, scheme, seen, rounds)
    for candidate in candidates:
        factors = candidate.clamp(1e-4, 1e4)
        factors = factors / (factors.amax() * factors.amin()).sqrt()
        error = _error(factors, weight, scheme, seen, rounds)
        if error < least:
            best, least = factors, error
    return best


def input_scale(scheme: TensorScheme, largest: float) -> torch.Tensor:
    """[1] float32, one scale for all inputs, or for all scales of inputs (NVFP4): the largest magnitude becomes the largest number."""
    element = scheme.element
    top = largest_of(element.format) if isinstance(element, Float) else float((1 << scheme.bits - 1) - 1)
    if len(scheme.scales) > 1:
        return torch.tensor([whole_scale(largest, top)])
    return torch.tensor([largest / top]).clamp(min=torch.finfo(torch.float32).tiny)


def _error(factors: torch.Tensor, weight: torch.Tensor, scheme: Scheme, seen: Seen, rounds: Rounds | None) -> float:
    """Of the rounding of weights, and of that of inputs, in parts of the squared outputs."""
    scaled = weight * factors
    error = seen.error(weight, rtn(scaled, Scheme(scheme.weight)).dequantize() / factors)
    if rounds is None or not len(seen.sample):
        return error
    x = seen.sample / factors
    apart = (rounds(x, float((seen.largest / factors).amax())) - x) @ scaled.T
    outputs = float((seen.sample @ weight.T).square().sum(dtype=torch.float64))
    return error + float(apart.square().sum(dtype=torch.float64)) / (outputs or 1.0)
