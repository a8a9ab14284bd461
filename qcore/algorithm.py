"""Algorithm: one way of making a quantized weight, as a row of facts; it knows no checkpoint format and no device."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qcore.kernel import Accepts

if TYPE_CHECKING:
    import torch

    from qcore.algorithms.scaling import Rounds
    from qcore.algorithms.seen import Seen
    from qcore.checkpoint.open import Checkpoint
    from qcore.scheme import Scheme
    from qcore.tensor import QuantizedTensor


@dataclass(frozen=True)
class Algorithm:
    """One row.

    accepts: the schemes that it can make. calibrated: it needs activations to look at. implementation:
    `module:function`, a `Quantize`, or a `QuantizeSeen` where it is calibrated. note: one sentence on what it does.
    scaling: `module:function`, a `Factors`: columns are scaled by these before, and what makes their inputs is divided. Of algorithms that are joined, as in `smoothquant+gptq`,
    all scale and the last one makes the weights. preparation: `module:function`, a `Prepare`: what is quantized is the checkpoint that it gives. tuned: the roundings of what it makes are learned block by block after (qcore/calibration/tuning.py).
    """

    name: str
    accepts: Accepts
    implementation: str
    calibrated: bool = False
    note: str = ""
    scaling: str = ""
    preparation: str = ""
    tuned: bool = False

    def load(self) -> Quantize:
        """Imports the implementation, of an algorithm that is not calibrated."""
        implementation: Quantize = _imported(self.implementation)
        return implementation

    def load_calibrated(self) -> QuantizeSeen:
        """Imports the implementation, of any algorithm; one that is not calibrated does not look at what was seen."""
        if self.calibrated:
            implementation: QuantizeSeen = _imported(self.implementation)
            return implementation
        plain = self.load()
        return lambda weight, scheme, seen: plain(weight, scheme)

    def load_preparation(self) -> Prepare:
        """Imports what prepares a checkpoint, of an algorithm that does."""
        preparation: Prepare = _imported(self.preparation)
        return preparation

    def load_scaling(self) -> Factors:
        """Imports what it scales by, of an algorithm that scales."""
        scaling: Factors = _imported(self.scaling)
        return scaling


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


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


class Prepare(Protocol):
    """What `preparation` is."""

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The same model, with weights that quantize better. Raises Refused."""
        ...


class Factors(Protocol):
    """What `scaling` is."""

    def __call__(self, weight: torch.Tensor, scheme: Scheme, seen: Seen, rounds: Rounds | None) -> torch.Tensor:
        """weight: float [N, K], those of all layers that have one input. rounds: what their inputs become, where the scheme rounds them. [K], all positive."""
        ...
