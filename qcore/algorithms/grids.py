"""The numbers that weights may become: units that a scheme's codes stand for, times scales that it can keep.

A grid finds a group's scale as that of least squared error, in which columns count by their importance.

Source: the search over smaller ranges is GPTQ's option `mse` (arXiv 2210.17323, its code), least squares between codes and weights that of ggml's k-quants; a range beyond
the largest number is that of NVFP4's four-over-six (arXiv 2512.02010).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from qcore.elements import Float, Granularity, Group, Int, PerChannel, PerTensor, ScaleType, Tile
from qcore.refusal import Refusal, Refused
from qcore.scheme import TensorScheme
from qcore.tensor import TORCH_FLOATS, float_table

_ROUNDS = 3
"""Of least squares: the scale for the units, then the units for the scale."""
_PARTS = tuple(torch.linspace(1.0, 0.5, 12).tolist())
"""Parts of a group's range that a scale may span: what lies outside is cut off."""
_OVER = (1.5, 1.25)
"""The same for floats, whose numbers lie closer where they are small."""


@dataclass(frozen=True)
class Fit:
    """scale, zero: float32 [1, N], of numbers scale * unit; units are whole multiples of 1 from -zero on where there is a zero point."""

    scale: torch.Tensor
    zero: torch.Tensor


class Grid(Protocol):
    """Each row of a group has a scale, or shares it (`pooled`)."""

    @property
    def scales(self) -> Scales: ...

    def nearest(self, values: torch.Tensor, fit: Fit) -> torch.Tensor:
        """The units whose numbers are the nearest to values [.., N]."""
        ...

    def rounding(self, fit: Fit) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes units of values [N] that are given in them."""
        ...

    def span(self, values: torch.Tensor) -> Fit:
        """Of values [g, N], so that none is cut off."""
        ...

    def starts(self, values: torch.Tensor) -> Iterator[Fit]:
        """What the search begins with, for values [g, N]."""
        ...

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest scale that the scheme can keep; zero becomes one that it can."""
        ...

    def pooled(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums of rows [1, N], added up over the rows that share a scale."""
        ...


def fit(grid: Grid, values: torch.Tensor, importance: torch.Tensor) -> Fit:
    """values: float32 [g, N], a group of each of N rows. importance: of its columns, [g], not negative, or [g, g], the sum of x x^T over what they are multiplied with."""
    best: Fit | None = None
    least = torch.empty(0)
    for start in grid.starts(values):
        best, least = _better(best, least, start, _error(grid, values, importance, start))
    assert best is not None
    now = best
    for _ in range(_ROUNDS):
        units = grid.nearest(values, now)
        along = weighted(importance, units)
        now = rescaled(grid, now, (along * values).sum(0, keepdim=True), along.mul_(units).sum(0, keepdim=True))
        best, least = _better(best, least, now, _error(grid, values, importance, now))
    return best


def _error(grid: Grid, values: torch.Tensor, importance: torch.Tensor, now: Fit) -> torch.Tensor:
    """Of values rounded to nearest, [1, N]."""
    apart = grid.nearest(values, now).mul_(now.scale).sub_(values)
    if importance.dim() == 1:
        return grid.pooled(importance[None] @ apart.square_())
    return grid.pooled((importance @ apart).mul_(apart).sum(0, keepdim=True))


def _better(best: Fit | None, least: torch.Tensor, now: Fit, error: torch.Tensor) -> tuple[Fit, torch.Tensor]:
    """Of each row the fit with the smaller error, and that."""
    if best is None:
        return now, error
    better = error < least
    scale, zero = torch.where(better, now.scale, best.scale), torch.where(better, now.zero, best.zero)
    return Fit(scale, zero), torch.minimum(error, least)


def weighted(importance: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """values: [g, N]; importance as in `fit`."""
    return importance[:, None] * values if importance.dim() == 1 else importance @ values


def rescaled(grid: Grid, now: Fit, above: torch.Tensor, below: torch.Tensor) -> Fit:
    """The fit with the scale above / below, sums of rows [1, N]; it stays where that says nothing."""
    above, below = grid.pooled(above), grid.pooled(below)
    scale = above / below
    return Fit(torch.where((below > 0) & (above != 0), grid.stored(scale), now.scale), now.zero)


@dataclass(frozen=True)
class Scales:
    """Those that a scheme can keep. kind: of the finest, as in Level. whole: what they are parts of. together: rows that share one, 0 for all."""

    kind: ScaleType
    whole: float = 1.0
    together: int = 1

    def over(self, rows: torch.Tensor, how: Callable[..., torch.Tensor]) -> torch.Tensor:
        """[1, N], of each row what `how` makes of the rows that share a scale with it."""
        if self.together == 1:
            return rows
        count = rows.shape[1]
        size = min(self.together, count) or count
        padded = torch.nn.functional.pad(rows, (0, -count % size))  # zeros change neither sums nor what is largest
        return how(padded.view(-1, size), dim=1).repeat_interleave(size)[None, :count]


@dataclass(frozen=True)
class IntegerGrid:
    """Integers of 1 to 8 bits. zero: whether groups have a zero point; else a float scale may be negative, which gives the side that has one code more to the larger weights."""

    bits: int
    zero: bool
    scales: Scales

    def nearest(self, values: torch.Tensor, fit: Fit) -> torch.Tensor:
        return self._within((values / fit.scale).round_(), fit.zero)

    def rounding(self, fit: Fit) -> Callable[[torch.Tensor], torch.Tensor]:
        zero = fit.zero[0]
        return lambda values: self._within(values.round(), zero)

    def span(self, values: torch.Tensor) -> Fit:
        return self._over(*self._reach(values), up=True)

    def starts(self, values: torch.Tensor) -> Iterator[Fit]:
        low, high = self._reach(values)
        for part in _PARTS:
            start = self._over(low * part, high * part)
            yield start
            if not self.zero and self.scales.kind == "float":
                yield Fit(-start.scale, start.zero)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Floats in float16, as most formats have them; one that float16 does not hold at full precision stays as it is."""
        if self.scales.kind != "float":
            return _stored(scale, self.scales)
        scale = scale.masked_fill(scale == 0, 1.0)
        half, span = scale.half().float(), torch.finfo(torch.float16)
        return torch.where((half.abs() >= span.smallest_normal) & half.isfinite(), half, scale)

    def pooled(self, sums: torch.Tensor) -> torch.Tensor:
        return self.scales.over(sums, torch.sum)

    def _within(self, units: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Those that codes are there for, in place."""
        top = (1 << self.bits) - 1
        return units.clamp_(-zero, top - zero) if self.zero else units.clamp_(-(top // 2) - 1, top // 2)

    def _reach(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What groups reach to, zero among it; without a zero point alike on both sides."""
        if not self.zero:
            largest = self.scales.over(values.abs().amax(0, keepdim=True), torch.amax)
            return -largest, largest
        low = self.scales.over(values.amin(0, keepdim=True).clamp(max=0).neg(), torch.amax).neg()
        return low, self.scales.over(values.amax(0, keepdim=True).clamp(min=0), torch.amax)

    def _over(self, low: torch.Tensor, high: torch.Tensor, *, up: bool = False) -> Fit:
        """From end to end. up: not less, so that nothing falls off the ends."""
        steps = (1 << self.bits) - 1
        wanted = (high - low) / steps
        scale = self.stored(wanted)
        if up and self.scales.kind == "float":
            more = scale.half().nextafter(torch.tensor(torch.inf, dtype=torch.float16)).float()
            scale = torch.where((scale < wanted) & more.isfinite(), more, scale)
        elif up:
            scale = torch.where(scale < wanted, 2 * scale, scale)
        if not self.zero:
            return Fit(scale, torch.full_like(scale, float(1 << (self.bits - 1))))
        return Fit(scale, (-low / scale).round_().clamp_(0, steps))


@dataclass(frozen=True)
class FloatGrid:
    """Small floats, under float32 scales, powers of two (OCP Microscaling) or e4m3fn ones (NVFP4)."""

    format: str
    scales: Scales

    def nearest(self, values: torch.Tensor, fit: Fit) -> torch.Tensor:
        return self._rounded(values / fit.scale)

    def rounding(self, fit: Fit) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._rounded

    def span(self, values: torch.Tensor) -> Fit:
        wanted = self._least(values)
        scale = self.stored(wanted)
        if self.scales.kind == "e8m0":
            scale = torch.where(scale < wanted, 2 * scale, scale)
        return Fit(scale, torch.zeros_like(scale))

    def starts(self, values: torch.Tensor) -> Iterator[Fit]:
        least = self._least(values)
        for part in (1.0, 2.0, 0.5) if self.scales.kind == "e8m0" else (*_OVER, *_PARTS):
            yield Fit(self.stored(least * part), torch.zeros_like(least))

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return _stored(scale, self.scales)

    def pooled(self, sums: torch.Tensor) -> torch.Tensor:
        return self.scales.over(sums, torch.sum)

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        top = largest_of(self.format)
        wanted = values.clamp(-top, top)
        if self.format in TORCH_FLOATS:
            return wanted.to(TORCH_FLOATS[self.format]).float()
        positive, between = _positive(self.format)
        return positive[torch.bucketize(wanted.abs().contiguous(), between)].copysign_(wanted)

    def _least(self, values: torch.Tensor) -> torch.Tensor:
        """The scale under which none is larger than the largest number."""
        return self.scales.over(values.abs().amax(0, keepdim=True), torch.amax) / largest_of(self.format)


def grid_of(scheme: TensorScheme, weight: torch.Tensor) -> Grid:
    """For a weight [N, K], all of it. Raises Refused (scheme-unsupported) for codes that hold no negative number."""
    level, element = scheme.scales[0], scheme.element
    shared, whole = level.granularity, 1.0
    if len(scheme.scales) > 1:
        whole = whole_scale(float(weight.abs().amax()), largest_of(str(getattr(element, "format", ""))))
    scales = Scales(level.type, whole, shared.rows if isinstance(shared, Tile) else 0 if isinstance(shared, PerTensor) else 1)  # fmt: skip
    if isinstance(element, Float):
        return FloatGrid(element.format, scales)
    assert isinstance(element, Int)
    if scheme.zero is None and not element.signed:
        raise Refused(Refusal("scheme-unsupported", "never", str(scheme), "unsigned codes without a zero point hold no negative weights",
                              fix="Use signed codes, or a zero point."))  # fmt: skip
    return IntegerGrid(element.bits, scheme.zero is not None, scales)


def local_step(grid: Grid, units: torch.Tensor) -> torch.Tensor:
    """How far the numbers around these units lie apart, in units."""
    if isinstance(grid, IntegerGrid):
        return torch.ones_like(units)
    assert isinstance(grid, FloatGrid)
    exponent, mantissa = (int(digit) for digit in grid.format[1:4:2])
    least = 2 - (1 << exponent - 1)
    return torch.exp2(units.abs().clamp(min=2.0**least).log2().floor() - mantissa)


def whole_scale(largest: float, top: float) -> float:
    """The tensor's scale above e4m3fn ones: a power of two, so that files that divide by it and files that multiply hold the same numbers."""
    return float(2.0 ** math.ceil(math.log2((largest or 1.0) / (448.0 * top))))


@cache
def largest_of(format: str) -> float:
    """The largest number of a float format."""
    if format in TORCH_FLOATS:
        return float(torch.finfo(TORCH_FLOATS[format]).max)
    return float(float_table(format).amax())


def columns_of_a_scale(granularity: Granularity, columns: int) -> int:
    """How many there are; of the last ones fewer may be left."""
    if isinstance(granularity, Group):
        return min(granularity.size, columns)
    if isinstance(granularity, Tile):
        return min(granularity.cols, columns)
    assert isinstance(granularity, PerChannel | PerTensor)
    return columns


@cache
def _positive(format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of a float format from zero on, and the middles between them."""
    table = float_table(format)
    positive = table[: len(table) // 2]
    return positive, (positive[1:] + positive[:-1]) / 2


def _stored(scale: torch.Tensor, scales: Scales) -> torch.Tensor:
    if scales.kind == "float":
        return scale.masked_fill(scale == 0, 1.0)
    if scales.kind == "e8m0":
        return scale.clamp(2.0**-126, 2.0**126).log2_().round_().exp2_()
    return (scale / scales.whole).clamp_(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * scales.whole
