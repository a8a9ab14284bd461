"""The numbers that a group of weights may become, under a scale and a zero point that are searched for: those with the least squared error, in which columns
count by their importance.

Source: the search over smaller ranges is GPTQ's option `mse` (arXiv 2210.17323, its code), least squares between codes and weights that of ggml's k-quants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcore.bits import pack
from qcore.elements import Granularity, Group, Int, PerChannel
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme, TensorScheme
from qcore.tensor import QuantizedTensor

_RANGES = torch.linspace(1.0, 0.5, 8).tolist()
"""Parts of a group's range that a scale may span: what lies outside is cut off."""
_ROUNDS = 2
"""Of least squares: the scale for the codes, then the codes for the scale."""


@dataclass(frozen=True)
class Fit:
    """scale, zero: float32 [1, N], of numbers (code - zero) * scale, codes from 0."""

    scale: torch.Tensor
    zero: torch.Tensor

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - self.zero) * self.scale


@dataclass(frozen=True)
class IntegerGrid:
    """Integers of 1 to 8 bits. zero: whether groups have a zero point; else it is the middle of the codes, and a scale may be negative, which gives the side that has one
    code more to the larger weights."""

    bits: int
    zero: bool

    @classmethod
    def of(cls, scheme: TensorScheme) -> IntegerGrid:
        assert isinstance(scheme.element, Int)
        return cls(scheme.element.bits, scheme.zero is not None)

    @property
    def steps(self) -> int:
        return (1 << self.bits) - 1

    def codes(self, values: torch.Tensor, fit: Fit) -> torch.Tensor:
        """The nearest codes of values [.., N]."""
        return (values / fit.scale + fit.zero).round_().clamp_(0, self.steps)

    def fit(self, values: torch.Tensor, importance: torch.Tensor) -> Fit:
        """values: float32 [g, N], a group of each of N rows. importance: [g, 1], not negative."""
        best, least = self._plain(values, 1.0, 1), torch.full((1, values.shape[1]), torch.inf)
        for part in _RANGES:
            for sign in (1,) if self.zero else (1, -1):
                fit = self._plain(values, part, sign)
                for _ in range(1 + _ROUNDS):
                    codes = self.codes(values, fit)
                    error = (fit.values(codes) - values).square_().mul_(importance).sum(0, keepdim=True)
                    better = error < least
                    best = Fit(torch.where(better, fit.scale, best.scale), torch.where(better, fit.zero, best.zero))
                    least = torch.where(better, error, least)
                    fit = _least_squares(values, codes, fit, importance)
        return best

    def _plain(self, values: torch.Tensor, part: float, sign: int) -> Fit:
        """Spans so much of the range."""
        if not self.zero:
            middle = 1 << (self.bits - 1)
            largest = values.abs().amax(0, keepdim=True) * (part * 2 * sign / self.steps)
            return Fit(stored(largest), torch.full_like(largest, float(middle)))
        low, high = values.amin(0, keepdim=True).clamp(max=0) * part, values.amax(0, keepdim=True).clamp(min=0) * part
        scale = stored((high - low) / self.steps)
        return Fit(scale, (-low / scale).round_().clamp_(0, self.steps))


def stored(scale: torch.Tensor) -> torch.Tensor:
    """As most formats keep it, in float16; one that float16 does not hold at full precision stays as it is. Zero becomes one: any does for zeros."""
    scale = scale.masked_fill(scale == 0, 1.0)
    half, span = scale.half().float(), torch.finfo(torch.float16)
    return torch.where((half.abs() >= span.smallest_normal) & half.isfinite(), half, scale)


def columns_of_a_scale(grid: Granularity, columns: int, algorithm: str) -> int:
    """How many there are. Raises Refused (shape-unsupported), in the algorithm's name, where groups do not divide the columns."""
    if isinstance(grid, PerChannel):
        return columns
    assert isinstance(grid, Group)
    if columns % grid.size:
        raise Refused(Refusal("shape-unsupported", "notimpl", algorithm, "groups must divide the input channels",
                              f"found {columns} channels in groups of {grid.size}",
                              "Choose a group size that divides them, or channel."))  # fmt: skip
    return grid.size


def integer_tensor(
    scheme: Scheme, shape: tuple[int, int], codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, index: torch.Tensor | None
) -> QuantizedTensor:  # fmt: skip
    """A weight of codes, uint8 [N, K] from 0, under scales and zero points [N, groups]."""
    element = scheme.weight.element
    assert isinstance(element, Int)
    if element.bits == 8:
        held = (codes ^ 0x80).view(torch.int8) if element.signed else codes
    else:
        held = pack(codes, element.bits)
    zeros = None
    if scheme.weight.zero is not None:
        middle = 1 << (element.bits - 1)
        zeros = (zero - middle).to(torch.int8) if element.signed else zero.to(torch.uint8)
    half = scale.half()
    scales = half if torch.equal(half.float(), scale) else scale
    return QuantizedTensor(scheme, shape, held, (scales,), zeros, index)


def _least_squares(values: torch.Tensor, codes: torch.Tensor, fit: Fit, importance: torch.Tensor) -> Fit:
    """The best scale for these codes."""
    shifted = codes - fit.zero
    weighted = shifted * importance
    below = (weighted * shifted).sum(0, keepdim=True)
    scale = (weighted * values).sum(0, keepdim=True) / below
    return Fit(torch.where((below > 0) & (scale != 0), stored(scale), fit.scale), fit.zero)
