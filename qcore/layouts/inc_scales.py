"""How INC makes a scale of a largest magnitude: by its scale methods, and by what a device's fp8 unit has.

Read from neural_compressor 3.10, torch/algorithms/fp8_quant/_core/scale_methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qcore.elements import Float, Group, Level, PerTensor
from qcore.scheme import TensorScheme

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
    """How scales of weights and of inputs are rounded, and whether weights have one for each output channel.

    search: exponents of the powers of two of which the one that leaves the least error is taken; of rows they are counted from the one that holds the row's
    largest magnitude. `hw`: those of the device. tokens: inputs have a scale for each row, which is known at run time alone."""

    weight: Rounding
    input: Rounding
    channels: bool = False
    search: Sequence[int] | Literal["hw"] = ()
    tokens: bool = False


METHODS: dict[str, ScaleMethod] = {
    "UNIT_SCALE": ScaleMethod("one", "one"),
    "HW_ALIGNED_SINGLE_SCALE": ScaleMethod("single", "single"),
    "MAXABS_HW": ScaleMethod("hw", "hw"),
    "MAXABS_POW2": ScaleMethod("pow2", "pow2"),
    "MAXABS_ARBITRARY": ScaleMethod("none", "none"),
    "MAXABS_HW_OPT_WEIGHT": ScaleMethod("hw", "hw", search="hw"),
    "MAXABS_POW2_OPT_WEIGHT": ScaleMethod("pow2", "pow2", search=range(-10, 10)),
    "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2": ScaleMethod("pow2", "hw", channels=True),
    "ACT_MAXABS_HW_WEIGHTS_PCS_OPT_POW2": ScaleMethod("pow2", "hw", channels=True, search=range(-3, 5)),
    "ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2": ScaleMethod("pow2", "pow2", channels=True),
    "ACT_MAXABS_POW2_WEIGHTS_PCS_OPT_POW2": ScaleMethod("pow2", "pow2", channels=True, search=range(-3, 5)),
    "ACT_MAXABS_PCS_POW2_WEIGHT_MAXABS_PTS_POW2_HW": ScaleMethod("hw", "pow2", tokens=True),
    "MAXABS_PCS_POW2": ScaleMethod("pow2", "pow2", channels=True, tokens=True),
}
"""By `scale_method`."""

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


def searched(
    weight: torch.Tensor, method: ScaleMethod, start: torch.Tensor, top: float, bounds: Range, fp8: torch.dtype
) -> torch.Tensor:
    """The scales [N, 1] or [1, 1] of a weight [N, K] that leave the least error, as INC searches them: each candidate is tried, in the weight's dtype. start: those of
    the largest magnitudes, which rows begin at. Of a tensor's candidates that leave the same the last is taken, of a row's the first."""
    import torch

    powers = range(bounds.high, bounds.low - 1, -bounds.step) if method.search == "hw" else method.search
    best = torch.zeros_like(start)
    least = torch.full_like(start, torch.inf)
    for power in powers:
        scale = start * 2.0**power if method.channels else torch.full_like(start, 2.0**power)
        left = weight - (weight / scale).clamp(-top, top).to(fp8).to(weight.dtype) * scale
        error = left.square().sum(1, keepdim=True) if method.channels else left.norm().reshape(1, 1)
        better = error < least if method.channels else error <= least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def input_scheme(element: Float, method: ScaleMethod, columns: int, *, dynamic: bool) -> TensorScheme:
    """What a layer's inputs are rounded to. At run time INC's scales are max |x| / (largest / 2), up to a power of two or not: twice what is written here, or a
    power of two of it, and an fp8 number under twice its scale is one of the same numbers, unless it is below 2^-5 of it. (Not so of plain scales for 240.) A
    scale for each row is written as a group of all columns."""
    if not dynamic:
        return TensorScheme(element, (Level(PerTensor()),))
    kind = "e8m0ceil" if method.input == "pow2" else "float"
    return TensorScheme(element, (Level(Group(columns) if method.tokens else PerTensor(), kind),), dynamic=True)  # type: ignore[arg-type]
