"""GPTQ for ggml's blocks: each is rounded so that it makes up for the errors of those before it; then scales, minima and codes are gone over again, each for what all others are.

Scales are whole numbers under a block's float16, so that the steps of `gptq` are those of a block's parts: a block's scales are found for the weights as they are to be when its turn
comes, and again once its codes are there, in closed form under the nearest whole numbers. Types without a form, such as iq1 to iq3, whose levels several weights share, are encoded a block at a time by
qcore/blocks, and once more for what all other blocks are.

Source: as `gptq`; a block of many columns in the place of one is QuIP#'s (arXiv 2402.04396).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch

from qcore.algorithms.block_forms import FORMS, Form, Scales, as_half
from qcore.algorithms.seen import Seen
from qcore.algorithms.symmetric import Factored
from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.quantize import quantize_blocks
from qcore.blocks.quantize_fit import inverse_of
from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

_PASSES, _OF_ENCODED = 3, 1
"""Over all blocks, after the first; and over those of types without a form, where more gain nothing."""
_AT_ONCE = 1 << 21
"""Weights that are solved together, whole rows of them; some copies are held of each."""
_PART = 64
"""Columns of a block whose changes reach the others together."""


def gptq_blocks(weight: torch.Tensor, scheme: Scheme, seen: Seen) -> QuantizedTensor:
    """weight: float [N, K], of a layer whose inputs were `seen`. Raises Refused (shape-unsupported) where K is no whole number of blocks."""
    kind = block_type(weight, scheme)
    form, size = FORMS.get(kind), BLOCK_TYPES[kind].elements
    diagonal = seen.sums.diagonal()
    places = sorted(torch.arange(len(diagonal)).split(size), key=lambda own: -float(diagonal[own].amax()))
    if form is not None:
        places = [own[diagonal[own].argsort(descending=True, stable=True)] for own in places]
    order = torch.cat(places)
    spans = [slice(*ends) for ends in pairwise(range(0, len(order) + 1, size))]
    stored = sorted(range(len(places)), key=lambda number: int(places[number].amin()))
    packed = []
    with Factored(seen.sums, order) as matrix:
        for rows in weight.to(torch.float32).split(max(1, _AT_ONCE // len(order))):
            blocks: list[_Coded] = [_Scaled(form, own % size) if form is not None else _Encoded(kind) for own in places]
            values = rows[:, order].T.contiguous()
            _first(blocks, spans, values, matrix)
            for _ in range(_PASSES if form is not None else _OF_ENCODED):
                _again(blocks, spans, values, matrix)
            packed.append(torch.cat([blocks[number].packed() for number in stored], 1))
    return QuantizedTensor(scheme, tuple(weight.shape), torch.cat(packed))


def block_type(weight: torch.Tensor, scheme: Scheme) -> str:
    """The scheme's block type. Raises Refused (shape-unsupported) where rows [N, K] are no whole blocks."""
    assert isinstance(scheme.weight.element, Block)
    block = BLOCK_TYPES[scheme.weight.element.type]
    if weight.shape[1] % block.elements:
        raise Refused(Refusal("shape-unsupported", "never", str(scheme), "rows are whole blocks",
                              f"found {weight.shape[1]} columns, expected a multiple of {block.elements}", "Choose a type of smaller blocks, such as Q4_0."))  # fmt: skip
    return block.name


class _Coded(Protocol):
    """A block of each of N rows, [e, N] in the order that its columns are taken in. made: what it stands for."""

    made: torch.Tensor

    def first(self, values: torch.Tensor, upper: torch.Tensor) -> None:
        """For values [e, N]; the squared error is that of (values - made) upper, [e, e]."""
        ...

    def again(self, gram: torch.Tensor, pull: torch.Tensor) -> None:
        """For what all others are: where `made` changes by `apart`, the squared error does by (gram apart - 2 pull) apart. gram: [e, e]; pull: [e, N], which is used up."""
        ...

    def packed(self) -> torch.Tensor:
        """uint8 [N, bytes]."""
        ...


def _first(blocks: list[_Coded], spans: list[slice], values: torch.Tensor, matrix: Factored) -> None:
    """Each for what makes up for the errors of those before it, as in `gptq`."""
    apart = torch.empty_like(values)
    for block, span in zip(blocks, spans, strict=True):
        before, corner = matrix.above(span).T @ apart[: span.start], matrix.corner(span)
        best = torch.linalg.solve_triangular(corner.T, before, upper=False).add_(values[span])
        block.first(best, corner)
        torch.sub(values[span], block.made, out=apart[span])


def _again(blocks: list[_Coded], spans: list[slice], values: torch.Tensor, matrix: Factored) -> None:
    pull = torch.zeros_like(values)
    for block, span in zip(blocks, spans, strict=True):
        matrix.add_product(pull, span, values[span] - block.made)
    for block, span in zip(blocks, spans, strict=True):
        old = block.made.clone()
        block.again(matrix.within(span), pull[span].clone())
        matrix.add_product(pull, span, block.made - old, -1.0)


class _Encoded:
    """Of a type without a form: the encoder finds all of it at once."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def first(self, values: torch.Tensor, upper: torch.Tensor) -> None:
        self._codes = quantize_blocks(self.kind, values.T.contiguous(), upper.square().sum(1))
        self.made = dequantize_blocks(self.kind, self._codes).T.contiguous()

    def again(self, gram: torch.Tensor, pull: torch.Tensor) -> None:
        best = torch.linalg.solve(gram, pull).add_(self.made)
        codes = quantize_blocks(self.kind, best.T.contiguous(), gram.diagonal())
        made = dequantize_blocks(self.kind, codes).T
        apart = made - self.made
        better = ((gram @ apart).sub_(2 * pull).mul_(apart)).sum(0) < 0
        self._codes = torch.where(better[:, None], codes, self._codes)
        self.made = torch.where(better, made, self.made)

    def packed(self) -> torch.Tensor:
        return self._codes


class _Scaled:
    """Of a type with a form. places: of its columns in the block, in the order that they are taken in."""

    def __init__(self, form: Form, places: torch.Tensor) -> None:
        self.form, self.places = form, places
        run_of = places // (len(places) // form.runs)
        self._run_of = run_of.tolist()
        self._runs = [(run_of == run).nonzero().flatten() for run in range(form.runs)]

    def first(self, values: torch.Tensor, upper: torch.Tensor) -> None:
        gram = upper @ upper.T
        back = self.places.argsort()
        found = self.form.fitted(values[back].T.contiguous(), gram.diagonal()[back])
        self.d, self.dmin, self.scales, self.minima = (
            part.T.contiguous() for part in (found.d, found.dmin, found.scales, found.minima)
        )
        self._apply()
        self.levels, self.made = torch.empty_like(values), torch.empty_like(values)
        pending = torch.zeros_like(values)
        for column in range(len(values)):
            self._round(column, values[column] + pending[column] / upper[column, column])
            pending[column + 1 :].addr_(upper[column, column + 1 :], values[column] - self.made[column])
        self.again(gram, gram @ (values - self.made))

    def again(self, gram: torch.Tensor, pull: torch.Tensor) -> None:
        if self.form.scales.count > 1:
            for run in range(self.form.runs):
                self._rescale_run(run, gram, pull)
        self._rescale(gram, pull)
        diagonal = gram.diagonal()
        for start in range(0, len(pull), _PART):
            own = slice(start, start + _PART)
            old, inside, left = self.made[own].clone(), gram[own, own], pull[own].clone()
            for place in range(len(left)):
                column = start + place
                self._round(column, old[place] + left[place] / diagonal[column])
                left[place + 1 :].addr_(inside[place, place + 1 :], self.made[column] - old[place], alpha=-1)
            pull.addmm_(gram[:, own], self.made[own] - old, alpha=-1)

    def packed(self) -> torch.Tensor:
        scales = Scales(self.d.T, self.dmin.T, self.scales.T, self.minima.T)
        return self.form.pack(self.levels[self.places.argsort()].T.contiguous(), scales)

    def _apply(self) -> None:
        """What scales and minima are, of each run [runs, N]."""
        self._scale, self._minimum = self.d * self.scales, self.dmin * self.minima
        self._inverse = inverse_of(self._scale)

    def _round(self, column: int, wanted: torch.Tensor) -> None:
        run = self._run_of[column]
        level = self.form.book.nearest(wanted.add_(self._minimum[run]).mul_(self._inverse[run]), wanted)
        self.levels[column] = level
        torch.mul(level, self._scale[run], out=self.made[column]).sub_(self._minimum[run])

    def _rescale_run(self, run: int, gram: torch.Tensor, pull: torch.Tensor) -> None:
        """The best scale and minimum of a run for its levels, of the whole numbers that are nearest to what would be best."""
        own, form = self._runs[run], self.form
        levels, inside = self.levels[own], gram[own[:, None], own]
        first = _Line(levels, inside @ levels, pull[own])
        lowest, highest = form.scales.first, form.scales.first + form.scales.step * (form.scales.count - 1)
        best = torch.zeros_like(first.square)
        scale, minimum, d, dmin = self.scales[run], self.minima[run], self.d[0], self.dmin[0]
        if form.minima is None:
            near = first.along * inverse_of(first.square)
        else:
            ones = torch.ones_like(levels)
            second = _Line(ones, inside.sum(1, keepdim=True).expand_as(levels), pull[own])
            cross = first.across(ones)
            near, _ = _both(first, second, cross)
        near = ((self._scale[run] + near) * inverse_of(d)).round_()
        for offset in (0, -1, 1) if form.minima is not None else (0,):
            tried = (near + offset).clamp_(lowest, highest)
            change = d * tried - self._scale[run]
            gain = first.gain(change)
            least = self.minima[run]
            if form.minima is not None:  # the best minimum beside that scale
                least = (second.along - cross * change) * inverse_of(second.square)
                least = ((self._minimum[run] - least) * inverse_of(dmin)).round_().clamp_(0, form.minima.count - 1)
                other = self._minimum[run] - dmin * least
                gain += second.gain(other) - 2 * cross * change * other
            better = gain > best
            scale, minimum = torch.where(better, tried, scale), torch.where(better, least, minimum)
            best = torch.where(better, gain, best)
        self.scales[run], self.minima[run] = scale, minimum
        self._scale[run], self._minimum[run] = d * scale, dmin * minimum
        self._inverse[run] = inverse_of(self._scale[run])
        made = levels * self._scale[run] - self._minimum[run]
        pull.addmm_(gram[:, own], made - self.made[own], alpha=-1)
        self.made[own] = made

    def _rescale(self, gram: torch.Tensor, pull: torch.Tensor) -> None:
        """The best d and dmin for all levels, scales and minima."""
        along = self.levels * self.scales[self._run_of]
        first = _Line(along, gram @ along, pull)
        if self.form.minima is None:
            d, dmin = as_half(self.d[0] + first.along * inverse_of(first.square)), self.dmin[0]
            gain = first.gain(d - self.d[0])
        else:
            least = -self.minima[self._run_of]
            second = _Line(least, gram @ least, pull)
            cross = first.across(least)
            d, dmin = (as_half(old[0] + step) for old, step in zip((self.d, self.dmin), _both(first, second, cross), strict=True))  # fmt: skip
            change, other = d - self.d[0], dmin - self.dmin[0]
            gain = first.gain(change) + second.gain(other) - 2 * cross * change * other
        better = (gain > 0) & ((d != 0) if self.form.signed else (d > 0) & (dmin >= 0))
        self.d, self.dmin = torch.where(better, d, self.d), torch.where(better, dmin, self.dmin)
        self._apply()
        made = self.levels * self._scale[self._run_of] - self._minimum[self._run_of]
        pull.addmm_(gram, made - self.made, alpha=-1)
        self.made = made


class _Line:
    """What the squared error becomes by steps along `direction` [n, N], of which the matrix makes `image`: less by step * (2 along - step * square)."""

    def __init__(self, direction: torch.Tensor, image: torch.Tensor, pull: torch.Tensor) -> None:
        self.image = image
        self.along, self.square = (direction * pull).sum(0), (direction * image).sum(0)

    def across(self, other: torch.Tensor) -> torch.Tensor:
        return (self.image * other).sum(0)

    def gain(self, step: torch.Tensor) -> torch.Tensor:
        return step * (2 * self.along - step * self.square)


def _both(first: _Line, second: _Line, cross: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best steps along two lines together."""
    inverse = inverse_of(first.square * second.square - cross * cross)
    along = (second.square * first.along - cross * second.along) * inverse
    return along, (first.square * second.along - cross * first.along) * inverse
