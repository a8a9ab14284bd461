"""AWQ: columns whose inputs are large are scaled up before they are rounded to nearest, and what is far out in a group is cut off where that is better for outputs.

Source: AWQ (arXiv 2306.00978). Errors of outputs are those of all inputs that were seen, through the sum of x x^T, not of some.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qcore.algorithms.grids import fit
from qcore.algorithms.rtn import rounded
from qcore.algorithms.scaling import Rounds, least_error
from qcore.algorithms.seen import Seen
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

_STEPS = 20
"""Of the exponent, from 0 to 1."""


def awq(weight: torch.Tensor, scheme: Scheme, seen: Seen) -> QuantizedTensor:
    """weight: float [N, K]. Rounded to nearest; a group's scale is that with the least error of outputs, all other groups left aside. Raises Refused (scheme-unsupported)."""
    return rounded(weight, scheme, seen.gram, fit)


def factors(weight: torch.Tensor, scheme: Scheme, seen: Seen, rounds: Rounds | None) -> torch.Tensor:
    """[K], of all layers that have one input, weight [N, K] being all of theirs: columns' inputs to a power, with or without their weights to what is left of it."""
    return least_error(_candidates(weight, seen), weight, scheme, seen, rounds)


def _candidates(weight: torch.Tensor, seen: Seen) -> Iterator[torch.Tensor]:
    inputs = seen.typical.clamp(min=1e-4)
    weights = weight.to(torch.float32).abs().mean(0).clamp(min=1e-8)
    for step in range(1, _STEPS + 1):
        yield inputs ** (step / _STEPS)
        yield inputs ** (step / _STEPS) / weights ** (1 - step / _STEPS)
