"""Algorithm: one way of making a quantized weight, as a row of facts; it knows no checkpoint format and no device."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qcore.kernel import Accepts

if TYPE_CHECKING:
    import torch

    from qcore.scheme import Scheme
    from qcore.tensor import QuantizedTensor


@dataclass(frozen=True)
class Algorithm:
    """One row.

    accepts: the schemes that it can make. calibrated: it needs activations to look at. implementation:
    `module:function`, a `Quantize`. note: one sentence on what it does.
    """

    name: str
    accepts: Accepts
    implementation: str
    calibrated: bool = False
    note: str = ""

    def load(self) -> Quantize:
        """Imports the implementation."""
        module, _, name = self.implementation.partition(":")
        implementation: Quantize = getattr(importlib.import_module(module), name)
        return implementation


class Quantize(Protocol):
    """What an implementation is."""

    def __call__(self, weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
        """weight: float [N, K]. The weight in the scheme. Raises Refused (scheme-unsupported, shape-unsupported)."""
        ...
