"""Finding scales and minima: x ~ scale * code + least, with codes 0 .. high. Compare `quantize_fit`, which has no minima.

For given codes the best pair solves two linear equations; for a given pair the best codes are the nearest ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qcore.blocks.quantize_fit import Steps, choose, fit_scale, inverse_of, representable

_CLIPS = tuple(-1.0 + 0.1 * i for i in range(21))
"""By how many codes the search lets the largest value lie beyond the last code."""


def fit_affine(x: Tensor, w: Tensor, high: int, most: float = 0.0, rounds: int = 2) -> tuple[Tensor, Tensor]:
    """scale >= 0 and least <= most for x, w [..., n]: two float32 [..., 1]."""
    lowest, highest = x.aminmax(dim=-1, keepdim=True)
    lowest = lowest.clamp(max=most)
    inverse = inverse_of(highest - lowest)
    sums = w.sum(-1), (w * x).sum(-1)
    best = torch.zeros_like(lowest), torch.zeros_like(lowest)
    gain = torch.full_like(lowest, -torch.inf)

    def keep(codes: Tensor) -> None:
        nonlocal best, gain
        scale, least, gained = _solve(x, w, codes, sums, most)
        better = (gained > gain) & (scale >= 0)
        best = choose(better, scale, best[0]), choose(better, least, best[1])
        gain = choose(better, gained, gain)

    for clip in _CLIPS:
        keep(((x - lowest) * (inverse * (high + clip))).round_().clamp_(0, high))
    for _ in range(rounds):
        keep(((x - best[1]) * inverse_of(best[0])).round_().clamp_(0, high))
    return best


def _solve(
    x: Tensor, w: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor], most: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair for given codes, and by how much the error is below sum w x^2: three [..., 1]."""
    weights, along_one = sums
    weighted = w * codes
    ones, along, square = weighted.sum(-1), (weighted * x).sum(-1), (weighted * codes).sum(-1)
    inverse = inverse_of(weights * square - ones * ones)
    scale = (weights * along - along_one * ones) * inverse
    # Codes that are all alike, or a minimum above zero: one of the two has to do.
    alone = inverse == 0
    least = torch.where(alone, along_one / weights, (square * along_one - ones * along) * inverse)
    without = least > most
    scale = torch.where(without, along * inverse_of(square), scale)
    least = torch.where(without, torch.zeros_like(least), least)
    return scale.unsqueeze(-1), least.unsqueeze(-1), (scale * along + least * along_one).unsqueeze(-1)


class AffineFit(NamedTuple):
    """x ~ d * scale * code - dmin * minimum. d, dmin: float32 [B, 1], float16's values; scales, minima: whole numbers,
    float32 [B, runs]; codes: float32 [B, runs, n]."""

    d: Tensor
    dmin: Tensor
    scales: Tensor
    minima: Tensor
    codes: Tensor


def fit_affine_runs(x: Tensor, w: Tensor, unit: Tensor, high: int, steps: Steps, rounds: int = 3) -> AffineFit:
    """x, w: float32 [B, runs, n], x relative to unit [B, 1]; steps: the multipliers of both d and dmin, from 0."""
    scale, least = (part.squeeze(-1) for part in fit_affine(x, w, high))
    weight = w.sum(-1)
    d, _ = fit_scale(scale, weight, steps)
    dmin, _ = fit_scale(-least, weight, steps)
    near = scale * inverse_of(d), -least * inverse_of(dmin)
    best, smallest = None, torch.full_like(unit, torch.inf)
    for _ in range(rounds):
        d, dmin = representable(d, unit), representable(dmin, unit)
        scales, minima, codes, errors = _codes_at(
            x, w, d, dmin, (steps.codes(near[0]), steps.codes(near[1])), high, steps
        )
        error = errors.sum(1, keepdim=True)
        found = AffineFit(d, dmin, scales, minima, codes)
        best = (
            found
            if best is None
            else AffineFit(*(choose(error < smallest, *pair) for pair in zip(found, best, strict=True)))
        )
        smallest = torch.minimum(error, smallest)
        d, dmin = _solve_both(x, w, scales, minima, codes)
        near = scales, minima
    assert best is not None
    return best._replace(d=best.d * unit, dmin=best.dmin * unit)


def _codes_at(
    x: Tensor, w: Tensor, d: Tensor, dmin: Tensor, near: tuple[Tensor, Tensor], high: int, steps: Steps
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best scales and minima around `near`, their codes, and each run's error, for given d and dmin."""
    best = (
        torch.zeros_like(near[0]),
        torch.zeros_like(near[0]),
        torch.zeros_like(x),
        torch.full_like(near[0], torch.inf),
    )
    for scales in steps.around(near[0]):
        scale = (d * scales).unsqueeze(-1)
        inverse = inverse_of(scale)
        for minima in steps.around(near[1]):
            shifted = x + (dmin * minima).unsqueeze(-1)
            codes = (shifted * inverse).round_().clamp_(0, high)
            error = (shifted - scale * codes).square_().mul_(w).sum(-1)
            better = error < best[3]
            found = scales, minima, codes, error
            best = tuple(choose(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    return best


def _solve_both(x: Tensor, w: Tensor, scales: Tensor, minima: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The best d and dmin, neither negative, for given codes: two [B, 1]."""
    first, second = scales.unsqueeze(-1) * codes, -minima.unsqueeze(-1)

    def total(values: Tensor) -> Tensor:
        return (w * values).sum((1, 2)).unsqueeze(1)

    a, b, c = total(first * first), total(first * second), total(second.square().expand_as(x))
    along_first, along_second = total(first * x), total(second * x)
    inverse = inverse_of(a * c - b * b)
    d, dmin = (c * along_first - b * along_second) * inverse, (a * along_second - b * along_first) * inverse
    alone = (inverse == 0) | (d < 0) | (dmin < 0)
    d = torch.where(alone, along_first * inverse_of(a), d)
    return d.clamp_(min=0), dmin.masked_fill_(alone, 0)
