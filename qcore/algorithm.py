"""Algorithm: one way of making a quantized weight, as a row of facts; it knows no checkpoint format and no device."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qcore.kernel import Accepts

if TYPE_CHECKING:
    import torch

    from qcore.algorithms.seen import Seen
    from qcore.scheme import Scheme
    from qcore.tensor import QuantizedTensor


@dataclass(frozen=True)
class Algorithm:
    """One row.

    accepts: the schemes that it can make. calibrated: it needs activations to look at. implementation:
    `module:function`, a `Quantize`, or a `QuantizeSeen` where it is calibrated. note: one sentence on what it does.
    """

    name: str
    accepts: Accepts
    implementation: str
    calibrated: bool = False
    note: str = ""

    def load(self) -> Quantize:
        """Imports the implementation, of an algorithm that is not calibrated."""
        implementation: Quantize = self._implementation()
        return implementation

    def load_calibrated(self) -> QuantizeSeen:
        """Imports the implementation, of any algorithm; one that is not calibrated does not look at what was seen."""
        if self.calibrated:
            implementation: QuantizeSeen = self._implementation()
            return implementation
        plain = self.load()
        return lambda weight, scheme, seen: plain(weight, scheme)

    def _implementation(self) -> Any:
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


class Quantize(Protocol):
    """What an implementation is."""

    def __call__(self, weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
        """weight: float [N, K]. The weight in the scheme. Raises Refused (scheme-unsupported, shape-unsupported)."""
        ...


class QuantizeSeen(Protocol):
    """What the implementation of a calibrated algorithm is."""

    def __call__(self, weight: torch.Tensor, scheme: Scheme, seen: Seen) -> QuantizedTensor:
        """weight: float [N, K], of a layer whose inputs in calibration were `seen`. Raises Refused (scheme-unsupported, shape-unsupported)."""
        ...
