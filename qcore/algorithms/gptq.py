"""GPTQ: columns are rounded one after the other, and those that are left make up for the error, as the layer's inputs in calibration have it; then codes and scales are gone over
again, each for what all others are.

Source: GPTQ (arXiv 2210.17323), in the form that QuIP found to be the same (LDLQ, arXiv 2307.13304), which needs no inverse; groups in order of importance and columns within them,
which needs no index (GPTQModel's group-aware reordering, arXiv 2505.14638); going over codes one column at a time is QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from qcore.algorithms.gptq_blocks import gptq_blocks
from qcore.algorithms.grids import Fit, Grid, columns_of_a_scale, fit, grid_of, rescaled
from qcore.algorithms.put_together import quantized_tensor
from qcore.algorithms.seen import Seen, damped, upper_of
from qcore.elements import Block, Group
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

_PASSES = 3
"""Over all codes and scales, after the first."""
_AT_ONCE = 1 << 22
"""Weights that are solved together, whole rows of them; some copies are held of each."""
_BLOCK = 128
"""Columns whose error reaches the others together."""


def gptq(weight: torch.Tensor, scheme: Scheme, seen: Seen) -> QuantizedTensor:
    """weight: float [N, K], of a layer whose inputs were `seen`. Scales of integers are float16 where that holds them."""
    if isinstance(scheme.weight.element, Block):
        return gptq_blocks(weight, scheme, seen)
    granularity = scheme.weight.scales[0].granularity
    weight = weight.to(torch.float32)
    size = columns_of_a_scale(granularity, weight.shape[1])
    gram = damped(seen.gram)  # what was never seen is rounded to nearest
    order, groups = _order(gram.diagonal(), size, whole=scheme.weight.ordered)
    grid = grid_of(scheme.weight, weight)
    gram = gram[order[:, None], order]
    upper = upper_of(gram)
    rows = max(1, _AT_ONCE // weight.shape[1]) if grid.scales.together == 1 else len(weight)
    units, fits = torch.empty_like(weight), []
    for start in range(0, len(weight), rows):
        solver = _Solver(weight[start : start + rows, order].T.contiguous(), gram, upper, grid, groups)
        solver.solve()
        units[start : start + rows, order] = solver.units.T
        fits.append(solver.fits)
    scale, zero = (
        torch.cat([torch.cat([getattr(now, part) for now in own]) for own in fits], 1) for part in ("scale", "zero")
    )
    index = None
    if scheme.weight.ordered:
        index = (order.argsort() // size).to(torch.int32)
    elif isinstance(granularity, Group):  # groups were taken in another order
        own = torch.stack([order[group][0] for group in groups]).argsort()
        scale, zero = scale[own], zero[own]
    return quantized_tensor(scheme, grid, units, scale.T.contiguous(), zero.T.contiguous(), index)  # fmt: skip


def _order(diagonal: torch.Tensor, size: int, *, whole: bool) -> tuple[torch.Tensor, list[slice]]:
    """Columns, the most important ones first: all of them, or of groups that stay together; and where in them the groups lie."""
    if whole:
        order = diagonal.argsort(descending=True, stable=True)
        parts = list(order.split(size))
    else:
        found = list(torch.arange(len(diagonal)).split(size))
        found.sort(key=lambda own: -float(diagonal[own].amax()))
        parts = [own[diagonal[own].argsort(descending=True, stable=True)] for own in found]
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0).tolist()
    return torch.cat(parts), [slice(start, stop) for start, stop in pairwise(ends)]


class _Solver:
    """weight: [K, N] in the order that columns are taken in. gram: [K, K] alike, damped, and upper as `upper_of` gives it. groups: in that order too.

    pull: the matrix times what weights are apart, [K, N], always up to date after `first`. error: of outputs, squared, as the last pass left it.
    """

    def __init__(
        self, weight: torch.Tensor, gram: torch.Tensor, upper: torch.Tensor, grid: Grid, groups: list[slice]
    ) -> None:
        self.weight, self.gram, self.upper, self.grid, self.groups = weight, gram, upper, grid, groups
        self.units = torch.empty_like(weight)
        self.made = torch.empty_like(weight)
        self.fits: list[Fit] = []
        self._group = [number for number, group in enumerate(groups) for _ in range(group.stop - group.start)]

    def solve(self) -> None:
        self.first()
        for _ in range(_PASSES):
            if not self.again():
                break

    def first(self) -> None:
        """Each column rounded to nearest, for what makes up for the errors of those before it. With the matrix as U U^T, U upper triangular, the squared error is
        the sum of those of the columns of (weight - made) U, of which each is the first that its own column is in."""
        upper, importance = self.upper, self.gram.diagonal()
        apart = torch.empty_like(self.weight)
        for start, stop in self._blocks():
            pending = upper[:start, start:stop].T @ apart[:start]
            for column in range(start, stop):
                place, group = column - start, self.groups[self._group[column]]
                if column == group.start:
                    inside = pending[place : group.stop - start]
                    if group.stop > stop:
                        inside = upper[:start, group].T @ apart[:start]
                    best = torch.linalg.solve_triangular(upper[group, group].T, inside, upper=False)
                    self.fits.append(fit(self.grid, best.add_(self.weight[group]), importance[group]))
                self._round(column, self.weight[column] + pending[place] / upper[column, column])
                torch.sub(self.weight[column], self.made[column], out=apart[column])
                pending[place + 1 :].addr_(upper[column, column + 1 : stop], apart[column])
        self.pull = self.gram @ apart
        self.error = self._error()

    def again(self) -> bool:
        """Goes over all scales and all codes, each for what all others are; whether that made the error smaller."""
        before, kept = self.error, (self.units.clone(), self.made.clone(), list(self.fits))
        for start, stop in self._blocks():
            for number in range(self._group[start], self._group[stop - 1] + 1):
                if self.groups[number].start >= start:
                    self._rescale(number)
            old, own, pull = self.made[start:stop].clone(), self.gram[start:stop, start:stop], self.pull[start:stop].clone()  # fmt: skip
            for column in range(start, stop):
                place = column - start
                self._round(column, old[place] + pull[place] / own[place, place])
                pull[place + 1 :].addr_(own[place, place + 1 :], self.made[column] - old[place], alpha=-1)
            self.pull.addmm_(self.gram[:, start:stop], self.made[start:stop] - old, alpha=-1)
        self.error = self._error()
        if self.error < before:
            return True
        self.units, self.made, self.fits = kept
        return False

    def _error(self) -> float:
        return float(((self.weight - self.made) * self.pull).sum(dtype=torch.float64))

    def _round(self, column: int, wanted: torch.Tensor) -> None:
        now = self.fits[self._group[column]]
        self.units[column] = self.grid.nearest(wanted, now)[0]
        torch.mul(self.units[column], now.scale[0], out=self.made[column])

    def _rescale(self, number: int) -> None:
        """The best scale of a group for its codes and for what all other groups are."""
        group, now = self.groups[number], self.fits[number]
        units = self.units[group]
        below = (self.gram[group, group] @ units).mul_(units).sum(0, keepdim=True)
        above = (self.pull[group] * units).sum(0, keepdim=True).addcmul_(below, now.scale)
        new = rescaled(self.grid, now, above, below)
        self.fits[number] = Fit(torch.where(new.scale * now.scale > 0, new.scale, now.scale), now.zero)
        apart = units * self.fits[number].scale - self.made[group]
        self.made[group] += apart
        self.pull.addmm_(self.gram[:, group], apart, alpha=-1)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Of whole groups where these are short, else parts of one."""
        start = stop = 0
        for group in self.groups:
            if group.stop - start > _BLOCK and stop > start:
                yield start, stop
                start = stop
            while group.stop - start > _BLOCK:
                yield start, start + _BLOCK
                start += _BLOCK
            stop = group.stop
            if group.stop - group.start > _BLOCK and stop > start:  # the last part of a long one
                yield start, stop
                start = stop
        if stop > start:
            yield start, stop
