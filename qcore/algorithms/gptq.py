"""GPTQ: columns are rounded one after the other, and those that are left make up for the error, as the layer's inputs in calibration have it; then codes and scales are gone over
again, each for what all others are.

Source: GPTQ (arXiv 2210.17323); groups in order of importance and columns within them, which needs no index (GPTQModel's group-aware reordering, arXiv 2505.14638);
going over codes one column at a time is QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qcore.algorithms.grids import Fit, IntegerGrid, columns_of_a_scale, integer_tensor, stored
from qcore.algorithms.seen import Seen
from qcore.elements import Group, Int
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

DAMPING = 0.01
"""What is added to the diagonal, in parts of its mean."""
_MOST_DAMPING = 1e6
"""Of a matrix of finite numbers less is enough."""
_PASSES = 3
"""Over all codes and scales, after the first."""
_BLOCK = 128
"""Columns whose error reaches the others together."""


def gptq(weight: torch.Tensor, scheme: Scheme, seen: Seen) -> QuantizedTensor:
    """weight: float [N, K], of a layer whose inputs were `seen`. Scales are float16 where that holds them.

    Raises Refused (shape-unsupported) where groups do not divide K.
    """
    element, grid = scheme.weight.element, scheme.weight.scales[0].granularity
    assert isinstance(element, Int)
    rows, columns = weight.shape
    size = columns_of_a_scale(grid, columns, "gptq")
    gram = seen.gram + torch.zeros(1)  # a copy
    diagonal = gram.diagonal()
    unseen = diagonal == 0
    diagonal += DAMPING * diagonal.mean() + unseen  # what was never seen is rounded to nearest
    order = _order(diagonal, size, whole=scheme.weight.ordered)
    solver = _Solver(
        weight.to(torch.float32)[:, order].T.contiguous(), gram[order][:, order], IntegerGrid.of(scheme.weight), size
    )
    solver.first()
    for _ in range(_PASSES):
        if not solver.again():
            break
    codes, scale, zero = solver.result()
    places = order.argsort()
    codes = codes[places].T.to(torch.uint8).contiguous()
    index = None
    if scheme.weight.ordered:
        index = (places // size).to(torch.int32)
    elif isinstance(grid, Group):  # groups were taken in another order
        own = places[::size] // size
        scale, zero = scale[own], zero[own]
    return integer_tensor(scheme, (rows, columns), codes, scale.T.contiguous(), zero.T.contiguous(), index)


def _order(diagonal: torch.Tensor, size: int, *, whole: bool) -> torch.Tensor:
    """Columns, the most important ones first: all of them, or of groups that stay together."""
    if whole:
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.view(-1, size)
    within = groups.argsort(dim=1, descending=True, stable=True) + torch.arange(0, len(diagonal), size)[:, None]
    return within[groups.amax(1).argsort(descending=True, stable=True)].reshape(-1)


class _Solver:
    """weight: [K, N] in the order that columns are taken in. gram: [K, K] alike, damped."""

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, grid: IntegerGrid, size: int) -> None:
        self.weight, self.gram, self.grid, self.size = weight, gram, grid, size
        self.codes = torch.empty_like(weight)
        self.made = torch.empty_like(weight)
        self.fits: list[Fit] = []

    def first(self) -> None:
        """Each column rounded to nearest, and its error made up for by those that follow."""
        weight, after = self.weight.clone(), _inverse(self.gram)
        importance = self.gram.diagonal()[:, None]
        for start, stop in self._blocks():
            left = weight[start:stop]
            errors = torch.empty_like(left)
            for column in range(start, stop):
                if column % self.size == 0:
                    group = slice(column, column + self.size)
                    now = weight[group]
                    if self.size > stop - column:  # the errors of this block have reached what is in it alone
                        now = now.clone()
                        now[stop - column :] -= (
                            after[start:column, stop : column + self.size].T @ errors[: column - start]
                        )
                    self.fits.append(self.grid.fit(now, importance[group]))
                fit, place = self.fits[-1], column - start
                codes = self.grid.codes(left[place], fit)[0]
                self.codes[column], self.made[column] = codes, fit.values(codes)[0]
                error = (left[place] - self.made[column]) / after[column, column]
                errors[place] = error
                left[place + 1 :].addr_(after[column, column + 1 : stop], error, alpha=-1)
            weight[stop:].addmm_(after[start:stop, stop:].T, errors, alpha=-1)

    def again(self) -> bool:
        """Goes over all scales and all codes; whether that made the error smaller."""
        before, codes, made, fits = self.error(), self.codes.clone(), self.made.clone(), list(self.fits)
        self._rescale()
        for start, stop in self._blocks():
            own = self.gram[start:stop, start:stop]
            pull = self.gram[start:stop] @ (self.weight - self.made)
            for column in range(start, stop):
                place, fit = column - start, self.fits[column // self.size]
                old = self.made[column].clone()
                wanted = old + pull[place] / own[place, place]
                self.codes[column] = self.grid.codes(wanted, fit)[0]
                self.made[column] = fit.values(self.codes[column])[0]
                pull.addr_(own[place], self.made[column] - old, alpha=-1)
        if self.error() < before:
            return True
        self.codes, self.made, self.fits = codes, made, fits
        return False

    def error(self) -> float:
        apart = self.weight - self.made
        return float((self.gram @ apart).mul_(apart).sum(dtype=torch.float64))

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """codes [K, N], scales and zero points [groups, N]."""
        return self.codes, torch.cat([fit.scale for fit in self.fits]), torch.cat([fit.zero for fit in self.fits])

    def _rescale(self) -> None:
        """The best scale of each group for its codes and for what all other groups are."""
        for number, fit in enumerate(self.fits):
            group = slice(number * self.size, (number + 1) * self.size)
            shifted = self.codes[group] - fit.zero
            along = self.gram[group, group] @ shifted
            below = (along * shifted).sum(0, keepdim=True)
            pull = (self.gram[group] @ (self.weight - self.made)).mul_(shifted).sum(0, keepdim=True)
            scale = fit.scale + torch.where(below > 0, pull / below, torch.zeros(1))
            scale = torch.where(scale * fit.scale > 0, stored(scale), fit.scale)
            self.fits[number] = Fit(scale, fit.zero)
            self.made[group] = self.fits[number].values(self.codes[group])

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Of whole groups where these are short."""
        columns = len(self.weight)
        step = max(self.size, _BLOCK // self.size * self.size) if self.size <= _BLOCK else _BLOCK
        for start in range(0, columns, step):
            yield start, min(start + step, columns)


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    """The upper triangular U of the inverse U^T U. Where rounding leaves the matrix without one, more is added to its diagonal."""
    more, mean = 0.0, float(gram.diagonal().mean())
    while more < _MOST_DAMPING:
        damped = gram + torch.diag(torch.full((len(gram),), more * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                found: torch.Tensor = upper
                return found
        more = max(DAMPING, 2 * more)
    raise ValueError("what the layer sees is not finite")
