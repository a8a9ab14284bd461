"""What the encoders share: finding scales, minima and codes with the least weighted squared error.

The problem is always min sum w (x - scale * level)^2 with levels from a given set (`Book`) and scales that are a block's
float16 d times one of few multipliers (`Steps`). For given levels the best scale is known (least squares), for a given
scale the best levels are the nearest ones; so a search tries several scales, keeps the best, and then goes to and fro.
All of it is plain torch over [B, runs, elements per run], without loops over blocks.

Numbers are relative to the block's largest magnitude (`unit` [B, 1]), so that squares neither overflow nor vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qcore.blocks.pack import LARGEST


class Book(Protocol):
    """The levels that codes stand for."""

    def nearest(self, values: Tensor, weights: Tensor) -> Tensor:
        """The levels with the least weighted squared distance: float32 [..., n], both arguments alike."""
        ...

    def inverses(self, values: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """Inverse scales [..., 1] to try for values [..., n]."""
        ...


def _by_extreme(values: Tensor, targets: Iterable[float]) -> Iterator[Tensor]:
    """Inverse scales that bring the value of the largest magnitude to each of the targets."""
    inverse = inverse_of(values.gather(-1, values.abs().argmax(-1, keepdim=True)))
    return (inverse * target for target in targets)


class Uniform:
    """The integers low..high. starts: where the search puts the value of the largest magnitude."""

    def __init__(self, low: int, high: int, starts: Iterable[float]) -> None:
        self.low, self.high, self.starts = low, high, tuple(starts)

    def nearest(self, values: Tensor, weights: Tensor) -> Tensor:
        return values.round().clamp_(self.low, self.high)

    def inverses(self, values: Tensor, weights: Tensor) -> Iterator[Tensor]:
        return _by_extreme(values, self.starts)


class Table:
    """A few integers, in any order and perhaps repeated; a code is the place of its level. Ties go towards zero where
    the levels lie symmetrically."""

    def __init__(self, levels: tuple[int, ...], starts: Iterable[float]) -> None:
        self.starts = tuple(starts)
        self._low, self._high = min(levels), max(levels)
        self._symmetric = self._low == -self._high and 0 in levels
        # The middle between two integers is a multiple of 1/2, so one level is nearest throughout (i/2 - 1/2, i/2].
        cells = range(2 * self._low, 2 * self._high + 1)
        self._nearest = [min(levels, key=lambda level: abs(level - (cell - 0.5) / 2)) for cell in cells]
        self._codes = [levels.index(level) if level in levels else 0 for level in range(self._low, self._high + 1)]

    def nearest(self, values: Tensor, weights: Tensor) -> Tensor:
        lower = 0 if self._symmetric else 2 * self._low
        cells = (values.abs() if self._symmetric else values).mul(2).ceil_().clamp_(lower, 2 * self._high)
        table = torch.tensor(self._nearest, dtype=torch.float32, device=values.device)
        levels = table[(cells - 2 * self._low).int()]
        return levels.copysign_(values) if self._symmetric else levels

    def codes(self, levels: Tensor) -> Tensor:
        """uint8, of the levels' shape."""
        table = torch.tensor(self._codes, dtype=torch.uint8, device=levels.device)
        return table[(levels - self._low).int()]

    def inverses(self, values: Tensor, weights: Tensor) -> Iterator[Tensor]:
        return _by_extreme(values, self.starts)


@dataclass(frozen=True)
class Steps:
    """The multipliers of a block's float16 that its runs' scales may be: first, first + step, ..."""

    first: float
    step: float
    count: int

    def nearest(self, values: Tensor, weights: Tensor) -> Tensor:
        return self.multipliers(self.codes(values))

    def inverses(self, values: Tensor, weights: Tensor) -> Iterator[Tensor]:
        last = self.first + self.step * (self.count - 1)
        ends = (self.first, last) if self.first < 0 else (last,)
        # The largest scale may take the last multiplier or leave it to smaller ones, if those then are met better.
        return _by_extreme(values, (end * (1 - 0.03 * i) for end in ends for i in range(-2, 9)))

    def codes(self, multipliers: Tensor) -> Tensor:
        """Whole numbers 0 .. count - 1, float32."""
        return ((multipliers - self.first) / self.step).round_().clamp_(0, self.count - 1)

    def multipliers(self, codes: Tensor) -> Tensor:
        return codes * self.step + self.first

    def around(self, codes: Tensor) -> Iterator[Tensor]:
        """The codes themselves and their neighbours."""
        for offset in (0, -1, 1) if self.count > 1 else (0,):
            yield (codes + offset).clamp_(0, self.count - 1)


ONE = Steps(1.0, 1.0, 1)
"""For types whose blocks are one run with one scale."""


class Fit(NamedTuple):
    """x ~ d * multiplier * level. d: float32 [B, 1], a float16's value; codes: the multipliers', float32 [B, runs];
    levels: float32 [B, runs, n]."""

    d: Tensor
    codes: Tensor
    levels: Tensor


def fit(x: Tensor, w: Tensor, unit: Tensor, book: Book, steps: Steps = ONE, rounds: int = 3) -> Fit:
    """x, w: float32 [B, runs, n], x relative to unit [B, 1]."""
    scale, curvature = fit_scale(x, w, book)
    scale, curvature = scale.squeeze(-1), curvature.squeeze(-1)
    d, _ = fit_scale(scale, curvature, steps)
    best, least = None, torch.full_like(unit, torch.inf)
    for _ in range(rounds):
        d = representable(d, unit)
        codes, levels, errors = _codes_at(x, w, d, steps.codes(scale * inverse_of(d)), book, steps)
        error = errors.sum(1, keepdim=True)
        found = Fit(d, codes, levels)
        best = found if best is None else Fit(*(choose(error < least, *pair) for pair in zip(found, best, strict=True)))
        least = torch.minimum(error, least)
        along, square = _products(x, w, levels)
        multipliers = steps.multipliers(codes)
        scale = _ratio(along, square)
        d = _ratio((multipliers * along).sum(1, keepdim=True), (multipliers.square() * square).sum(1, keepdim=True))
    assert best is not None
    return best._replace(d=best.d * unit)


def fit_scale(x: Tensor, w: Tensor, book: Book) -> tuple[Tensor, Tensor]:
    """The best scale of those that the book's starts lead to, and the curvature sum w level^2 of the error there.

    x, w: float32 [..., n]. Returns two float32 [..., 1].
    """
    scale = torch.zeros_like(x[..., :1])
    curvature, most = scale.clone(), scale.clone()
    for inverse in book.inverses(x, w):
        along, square = (part.unsqueeze(-1) for part in _products(x, w, book.nearest(x * inverse, w)))
        ratio = _ratio(along, square)
        gain = along * ratio  # by so much the error is below sum w x^2
        better = gain > most
        scale, curvature = choose(better, ratio, scale), choose(better, square, curvature)
        most = torch.maximum(gain, most)
    return scale, curvature


def _codes_at(x: Tensor, w: Tensor, d: Tensor, near: Tensor, book: Book, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """The best multipliers' codes around `near` [B, runs], their levels, and each run's error, for a given d."""
    best = torch.zeros_like(near), torch.zeros_like(x), torch.full_like(near, torch.inf)
    for codes in steps.around(near):
        scale = (d * steps.multipliers(codes)).unsqueeze(-1)
        levels = book.nearest(x * inverse_of(scale), w)
        error = (x - scale * levels).square_().mul_(w).sum(-1)
        better = error < best[2]
        best = choose(better, codes, best[0]), choose(better, levels, best[1]), choose(better, error, best[2])
    return best


def _products(x: Tensor, w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """sum w x level and sum w level^2 over the last dimension."""
    weighted = w * levels
    return (weighted * x).sum(-1), (weighted * levels).sum(-1)


def representable(d: Tensor, unit: Tensor) -> Tensor:
    """d as float16 can hold it in the block's own units."""
    return (d * unit).clamp(-LARGEST, LARGEST).half().float() / unit


def inverse_of(values: Tensor) -> Tensor:
    """1 / values, and 0 where there is no finite one."""
    return values.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def _ratio(dividend: Tensor, divisor: Tensor) -> Tensor:
    return (dividend / divisor).nan_to_num_(0.0, 0.0, 0.0)


def choose(where: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """torch.where, with a condition that may lack the last dimensions."""
    return torch.where(where.view(*where.shape, *[1] * (first.dim() - where.dim())), first, second)
