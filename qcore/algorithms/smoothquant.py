"""SmoothQuant: what is hard to round moves from inputs to weights, column by column.

Source: SmoothQuant (arXiv 2211.10438); its strength is searched for, as the one with the least error of outputs.
"""

from __future__ import annotations

import torch

from qcore.algorithms.scaling import Rounds, least_error
from qcore.algorithms.seen import Seen
from qcore.scheme import Scheme

_STEPS = 20
"""Of the strength, from 0 to 1."""


def factors(weight: torch.Tensor, scheme: Scheme, seen: Seen, rounds: Rounds | None) -> torch.Tensor:
    """[K], of all layers that have one input, weight [N, K] being all of theirs."""
    inputs, weights = seen.largest.clamp(min=1e-5), weight.to(torch.float32).abs().amax(0).clamp(min=1e-5)
    strengths = (step / _STEPS for step in range(1, _STEPS))
    return least_error((inputs**part / weights ** (1 - part) for part in strengths), weight, scheme, seen, rounds)
