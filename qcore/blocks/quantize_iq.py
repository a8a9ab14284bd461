"""Encoders of the IQ1, IQ2 and IQ3 types: the inverse of `iq`. Each takes x, w [B, 256] and unit [B, 1], as in
`quantize_fit`; the levels are tuples of 4 or 8 from a grid, all of which are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.blocks.grids import grid, shifted_grid
from qcore.blocks.pack import LARGEST, half, neighbours, words
from qcore.blocks.quantize_fit import Fit, Steps, fit, inverse_of

_DISTANCES_CPU, _DISTANCES = 1 << 18, 1 << 26
"""Distances between tuples and grid points that are held at once: what a CPU's cache holds, or what fills a device."""
_LANES = 32
"""The least of a row of distances is found in two steps, over columns of so many lanes: a plain argmin is slow."""
_STARTS = (0.8, 1.1)
"""Root mean squares, relative to the grid's own, that the search brings the values to. More of them, or going to and fro
more than once, take time and gain less than a hundredth."""


class Grid:
    """Tuples of a grid. With several variants of it, as many consecutive tuples as `group` share a variant.

    points: float32 [variants, points, n].
    """

    def __init__(self, points: Tensor, group: int = 1) -> None:
        self.points, self.group = points, group
        self._size, self._extreme = points.square().mean().sqrt().item(), points.max().item()
        # |y - g|^2 = |y|^2 - 2 y g + g^2, the first of which is the same for every point.
        self._matrix = torch.cat([-2 * points, points.square()], 2).transpose(1, 2).contiguous()

    def inverses(self, values: Tensor, weights: Tensor) -> Iterator[Tensor]:
        size = (weights * values.square()).sum(-1, keepdim=True).div_(weights.sum(-1, keepdim=True)).sqrt_()
        for start in _STARTS:
            yield inverse_of(size) * (start * self._size)
        yield inverse_of(values.abs().amax(-1, keepdim=True)) * self._extreme  # for the sake of outliers

    def nearest(self, values: Tensor, weights: Tensor) -> Tensor:
        variants, indices = self.codes(values, weights)
        return self.points[variants, indices].view(values.shape)

    def codes(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest points of values [..., k * n] as variant and index: two int64 [tuples]."""
        size = self.points.shape[2]
        weights = weights.reshape(-1, size)
        both = torch.cat([weights * values.reshape(-1, size), weights], 1)
        room = _DISTANCES_CPU if values.device.type == "cpu" else _DISTANCES
        step = max(1, room // self.points.shape[1] // self.group) * self.group
        parts = [self._codes(part) for part in both.split(step)]
        variants, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        return variants, indices

    def _codes(self, both: Tensor) -> tuple[Tensor, Tensor]:
        found = [_least(both @ matrix) for matrix in self._matrix]
        if len(found) == 1:
            return torch.zeros_like(found[0][1]), found[0][1]
        distances, indices = (torch.stack(part) for part in zip(*found, strict=True))
        variants = distances.view(len(found), -1, self.group).sum(2).argmin(0).repeat_interleave(self.group)
        return variants, indices.gather(0, variants.unsqueeze(0)).squeeze(0)


def _least(distances: Tensor) -> tuple[Tensor, Tensor]:
    """The least of each row and its place: [T], int64 [T]."""
    columns = distances.view(len(distances), -1, _LANES)
    lane = columns.amin(1).argmin(1)
    least, column = columns.gather(2, lane.view(-1, 1, 1).expand(-1, columns.shape[1], 1)).squeeze(2).min(1)
    return least, column * _LANES + lane


@functools.cache
def _grid(name: str, device: torch.device) -> Grid:
    table = grid(name, device)
    points = table.view(torch.int8).view(1, len(table), -1).float()
    return Grid(points)


@functools.cache
def _shifted(group: int, device: torch.device) -> Grid:
    """iq1's grid plus 1/8 and minus 1/8, in eighths."""
    return Grid(shifted_grid(device).view(torch.int8).view(2, 2048, 8).float(), group)


def _signed(
    x: Tensor, w: Tensor, unit: Tensor, name: str, runs: int, steps: Steps, even: bool
) -> tuple[Fit, Tensor, Tensor]:
    """The fit of magnitudes, the grid's indices [B, tuples] and sign codes [B, 32], seven bits where `even`."""
    minus = x < 0
    if even:
        # The sign of the element that loses the least is turned where the number of minus signs is odd.
        tuples, odd = minus.view(-1, 8), minus.view(-1, 8).sum(1, keepdim=True) & 1
        cheapest = (w * x.abs()).view(-1, 8).argmin(1, keepdim=True)
        minus = tuples.scatter(1, cheapest, tuples.gather(1, cheapest) ^ odd.bool()).view_as(x)
    book = _grid(name, x.device)
    along = torch.where(minus, -x, x).view(-1, runs, 256 // runs)
    found = fit(along, w.view_as(along), unit, book, steps, rounds=1)
    _, indices = book.codes(found.levels, torch.ones_like(found.levels))
    return found, indices.view(len(x), -1), neighbours(minus, 1) & (127 if even else 255)


def _sign_words(signs: Tensor, scales: Tensor) -> Tensor:
    """Four sign codes of seven bits and a scale of four a run: [B, 32], [B, 8] -> int64 [B, 8]."""
    parts = signs.view(-1, 8, 4).long()
    return sum((parts[:, :, i] << 7 * i for i in range(4)), scales.long() << 28)


def _iq2_xxs(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found, indices, signs = _signed(x, w, unit, "iq2_xxs", 8, _QUARTERS, even=True)
    tail = words(_sign_words(signs, found.codes), torch.int32).view(-1, 8, 4)
    runs = torch.cat([indices.to(torch.uint8).view(-1, 8, 4), tail], 2)
    return torch.cat([half(found.d), runs.flatten(1)], 1)


def _iq2_xs(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found, indices, signs = _signed(x, w, unit, "iq2_xs", 16, _QUARTERS, even=True)
    return torch.cat([half(found.d), words(indices | signs.long() << 9, torch.int16), neighbours(found.codes, 4)], 1)


def _iq2_s(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found, indices, signs = _signed(x, w, unit, "iq2_s", 16, _QUARTERS, even=False)
    low, high = (indices & 255).to(torch.uint8), neighbours(indices >> 8, 2)
    return torch.cat([half(found.d), low, signs, high, neighbours(found.codes, 4)], 1)


def _iq3_xxs(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found, indices, signs = _signed(x, w, unit, "iq3_xxs", 8, Steps(0.25, 0.5, 16), even=True)
    tail = words(_sign_words(signs, found.codes), torch.int32)
    return torch.cat([half(found.d), indices.to(torch.uint8), tail], 1)


def _iq3_s(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found, indices, signs = _signed(x, w, unit, "iq3_s", 8, Steps(1, 2, 16), even=False)
    low, high = (indices & 255).to(torch.uint8), neighbours(indices >> 8, 1)
    return torch.cat([half(found.d), low, high, signs, neighbours(found.codes, 4)], 1)


def _iq1_s(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found, minus, indices = _ternary(x, w, unit, 8)
    high = indices.view(-1, 8, 4) >> 8
    tail = sum((high[:, :, i] << 3 * i for i in range(4)), found.codes.long() << 12 | minus[:, ::4] << 15)
    return torch.cat([half(found.d), (indices & 255).to(torch.uint8), words(tail, torch.int16)], 1)


def _iq1_m(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found, minus, indices = _ternary(x, w, unit, 16)
    d = found.d.clamp(-LARGEST, LARGEST).half().view(torch.int16).long()
    scales = found.codes.long().view(-1, 4, 4)
    tail = torch.stack([d >> 4 * i & 15 for i in range(4)], 2).squeeze(1) << 12
    tail = sum((scales[:, :, i] << 3 * i for i in range(4)), tail)
    return torch.cat(
        [(indices & 255).to(torch.uint8), neighbours(indices >> 8 | minus << 3, 4), words(tail, torch.int16)], 1
    )


def _ternary(x: Tensor, w: Tensor, unit: Tensor, runs: int) -> tuple[Fit, Tensor, Tensor]:
    """The fit, and for each tuple whether 1/8 is subtracted, and the grid's index: two int64 [B, 32]."""
    along = x.view(-1, runs, 256 // runs)
    book = _shifted(4 if runs == 8 else 1, x.device)
    found = fit(along, w.view_as(along), unit, book, Steps(1 / 8, 2 / 8, 8), rounds=1)
    variants, indices = book.codes(found.levels, torch.ones_like(found.levels))
    return found, variants.view(-1, 32), indices.view(-1, 32)


_QUARTERS = Steps(0.5 * 0.25, 0.25, 16)

SEARCH: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "iq1_s": _iq1_s,
        "iq1_m": _iq1_m,
        "iq2_xxs": _iq2_xxs,
        "iq2_xs": _iq2_xs,
        "iq2_s": _iq2_s,
        "iq3_xxs": _iq3_xxs,
        "iq3_s": _iq3_s,
    }
)
