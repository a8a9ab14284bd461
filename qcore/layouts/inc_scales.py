"""How INC makes a scale of a largest magnitude: by its scale methods, and by what a device's fp8 unit has.

Read from neural_compressor 3.10, torch/algorithms/fp8_quant/_core/scale_methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Rounding = Literal["one", "single", "hw", "pow2", "none"]
"""one: the scale is 1. single: the range's largest. hw: up to one of the range's. pow2: up to a power of two."""


@dataclass(frozen=True)
class Range:
    """largest: an e4m3 value. The scales that cost nothing are 2^low, 2^(low + step), ... 2^high."""

    largest: float
    low: int
    high: int
    step: int


RANGES: dict[str | None, Range] = {
    None: Range(448.0, -55, 7, 1),
    "GAUDI3": Range(448.0, -55, 7, 1),
    "GAUDI2": Range(240.0, -8, 4, 4),
}
"""By `device_for_scales`."""


@dataclass(frozen=True)
class ScaleMethod:
    """How scales of weights and of inputs are rounded, and whether weights have one for each output channel."""

    weight: Rounding
    input: Rounding
    channels: bool = False


METHODS: dict[str, ScaleMethod] = {
    "UNIT_SCALE": ScaleMethod("one", "one"),
    "HW_ALIGNED_SINGLE_SCALE": ScaleMethod("single", "single"),
    "MAXABS_HW": ScaleMethod("hw", "hw"),
    "MAXABS_POW2": ScaleMethod("pow2", "pow2"),
    "MAXABS_ARBITRARY": ScaleMethod("none", "none"),
    "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2": ScaleMethod("pow2", "hw", channels=True),
    "ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2": ScaleMethod("pow2", "pow2", channels=True),
}
"""By `scale_method`; those that search scales with a device's own kernels, and those for run time, are not read."""

_BACKOFF = {"weight": 0.5, "input": 0.25}
"""How much of the range the largest magnitude takes."""


def rounded(largest: torch.Tensor, how: Rounding, what: str, top: float, bounds: Range) -> torch.Tensor:
    """The scale of a largest magnitude, in its dtype; zeros have 1. what: weight, or input; top: fp8's largest number."""
    if how in ("one", "single"):
        return largest.new_full(largest.shape, 1.0 if how == "one" else 2.0**bounds.high)
    scale = positive(largest / (top * _BACKOFF[what]))
    if how == "none":
        return scale
    power = scale.log2().ceil()
    if how == "hw":
        power = ((power / bounds.step).ceil() * bounds.step).clamp(bounds.low, bounds.high)
    return power.exp2()


def positive(scale: torch.Tensor) -> torch.Tensor:
    """Zeros, and what has no finite reciprocal, become 1."""
    filled: torch.Tensor = scale.masked_fill(scale.float() < 2.0**-126, 1.0)
    return filled
