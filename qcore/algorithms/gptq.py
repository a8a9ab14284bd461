"""GPTQ: columns are rounded one after the other, and those that are left make up for the error, as the layer's inputs in calibration have it; then codes and scales are gone over
again, each for what all others are.

Source: GPTQ (arXiv 2210.17323), in the form that QuIP found to be the same (LDLQ, arXiv 2307.13304), which needs no inverse; groups in order of importance and columns within them,
which needs no index (GPTQModel's group-aware reordering, arXiv 2505.14638); going over codes one column at a time is QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

from itertools import pairwise

import torch

from qcore.algorithms.gptq_blocks import gptq_blocks
from qcore.algorithms.grids import Fit, Grid, columns_of_a_scale, fit, grid_of, rescaled
from qcore.algorithms.put_together import quantized_tensor
from qcore.algorithms.seen import Seen
from qcore.algorithms.symmetric import Factored, blocks_of
from qcore.elements import Block, Group
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

_PASSES = 3
"""Over all codes and scales, after the first."""
_AT_ONCE = 1 << 21
"""Weights that are solved together, whole rows of them; some copies are held of each."""


def gptq(weight: torch.Tensor, scheme: Scheme, seen: Seen) -> QuantizedTensor:
    """weight: float [N, K], of a layer whose inputs were `seen`. Scales of integers are float16 where that holds them."""
    if isinstance(scheme.weight.element, Block):
        return gptq_blocks(weight, scheme, seen)
    granularity = scheme.weight.scales[0].granularity
    weight = weight.to(torch.float32)
    size = columns_of_a_scale(granularity, weight.shape[1])
    order, groups = _order(seen.sums.diagonal(), size, whole=scheme.weight.ordered)
    grid = grid_of(scheme.weight, weight)
    rows = max(1, _AT_ONCE // weight.shape[1]) if grid.scales.together == 1 else len(weight)
    units, fits = torch.empty_like(weight), []
    with Factored(seen.sums, order) as matrix:  # in which what was never seen is rounded to nearest
        for start in range(0, len(weight), rows):
            own, found = _solved(weight[start : start + rows, order].T.contiguous(), matrix, grid, groups)
            units[start : start + rows, order] = own.T
            fits.append(found)
    scale, zero = (
        torch.cat([torch.cat([getattr(now, part) for now in found]) for found in fits], 1) for part in ("scale", "zero")
    )
    index = None
    if scheme.weight.ordered:
        index = (order.argsort() // size).to(torch.int32)
    elif isinstance(granularity, Group):  # groups were taken in another order
        stored = torch.stack([order[group][0] for group in groups]).argsort()
        scale, zero = scale[stored], zero[stored]
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


def _solved(weight: torch.Tensor, matrix: Factored, grid: Grid, groups: list[slice]) -> tuple[torch.Tensor, list[Fit]]:
    """Units [K, N] and the fits of groups, as `_Solver` has them."""
    solver = _Solver(weight, matrix, grid, groups)
    solver.first()
    for _ in range(_PASSES):
        if not solver.again():
            break
    return solver.units, solver.fits


class _Solver:
    """weight: [K, N] in the order that columns are taken in, which is used up. matrix: [K, K] alike, of the inputs' sums. groups: in that order too.

    After `first` these are always up to date: units and fits; apart, what weights are away from these, and pull, the matrix times that, [K, N].
    """

    def __init__(self, weight: torch.Tensor, matrix: Factored, grid: Grid, groups: list[slice]) -> None:
        self.matrix, self.grid, self.groups = matrix, grid, groups
        self.units, self.apart = torch.empty_like(weight), weight
        self.fits: list[Fit] = []

    def first(self) -> None:
        """Each column rounded to nearest, for what makes up for the errors of those before it. With the matrix as U U^T, U upper triangular, the squared error is
        the sum of those of the columns of (weight - made) U, of which each is the first that its own column is in."""
        matrix = self.matrix
        for group in self.groups:
            before = self._before(group)
            best = self.apart[group]  # weights still, of those that have not had their turn
            if group.start:
                best = torch.linalg.solve_triangular(matrix.corner(group).T, before, upper=False).add_(best)
            now = fit(self.grid, best, matrix.diagonal[group])
            self.fits.append(now)
            for part in blocks_of(group):
                pending = before if part == group else self._before(part)
                own, corner = self.apart[part] / now.scale, matrix.corner(part)
                alone = corner.diagonal()
                wanted = (pending / alone[:, None]).div_(now.scale).add_(own)
                self.units[part] = self._rounded(now, wanted, own, corner / alone)
                torch.mul(own.sub_(self.units[part]), now.scale, out=self.apart[part])
        self.pull = torch.zeros_like(self.apart)
        for part in self._all():
            matrix.add_product(self.pull, part, self.apart[part])
        self.error = self._error()

    def again(self) -> bool:
        """Goes over all scales and all codes, each for what all others are; whether that made the error smaller."""
        before, kept = self.error, (self.units.clone(), list(self.fits))
        for number, group in enumerate(self.groups):
            parts, moved = blocks_of(group), self._rescale(number)
            if len(parts) > 1:
                self._move(group, moved)
                moved = torch.zeros(())
            now = self.fits[number]
            for part in parts:
                own, old = self.matrix.within(part), self.units[part].clone()
                pull = self.pull[part] - own @ moved if moved.dim() else self.pull[part]
                wanted = (pull / own.diagonal()[:, None]).div_(now.scale).add_(old)
                self.units[part] = self._rounded(now, wanted, old, own / own.diagonal())
                self._move(part, moved + (self.units[part] - old).mul_(now.scale))
        self.error = self._error()
        if self.error < before:
            return True
        self.units, self.fits = kept
        return False

    def _rounded(self, now: Fit, wanted: torch.Tensor, old: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Units [g, N], one column after the other. wanted: of each, in units, when its turn comes; those that follow take a column's share, [g, g], of what it is off from `old`."""
        nearest, units = self.grid.rounding(now), []
        for column, (own, before) in enumerate(zip(wanted.unbind(), old.unbind(), strict=True), 1):
            units.append(nearest(own))
            wanted[column:].addr_(shares[column - 1, column:], before - units[-1])
        return torch.stack(units)

    def _before(self, part: slice) -> torch.Tensor:
        """What columns have to make up for of those before them."""
        return self.matrix.above(part).T @ self.apart[: part.start]

    def _rescale(self, number: int) -> torch.Tensor:
        """The best scale of a group for its codes and for what all other groups are. What its weights are moved by, which `_move` is not told of yet."""
        group, now = self.groups[number], self.fits[number]
        units = self.units[group]
        below = self.matrix.inside(group, units).mul_(units).sum(0, keepdim=True)
        above = (self.pull[group] * units).sum(0, keepdim=True).addcmul_(below, now.scale)
        new = rescaled(self.grid, now, above, below)
        self.fits[number] = Fit(torch.where(new.scale * now.scale > 0, new.scale, now.scale), now.zero)
        return units * (self.fits[number].scale - now.scale)

    def _move(self, part: slice, by: torch.Tensor) -> None:
        self.apart[part] -= by
        self.matrix.add_product(self.pull, part, by, -1.0)

    def _error(self) -> float:
        """Of outputs, squared."""
        return sum(float((self.apart[part] * self.pull[part]).sum(dtype=torch.float64)) for part in self._all())

    def _all(self) -> list[slice]:
        return blocks_of(slice(0, len(self.apart)))
