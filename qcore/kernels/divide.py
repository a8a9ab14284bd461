"""Division by a constant, with the same last bit on every device."""

from __future__ import annotations

import torch


def divide(values: torch.Tensor, constant: float) -> torch.Tensor:
    """values / constant, rounded once. Torch multiplies by the reciprocal on a GPU where the divisor is a plain number, and a
    last bit of a scale decides which way codes fall."""
    return values / values.new_full((), constant)
