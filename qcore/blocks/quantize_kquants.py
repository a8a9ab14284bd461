"""Encoders of the K types: the inverse of `kquants`. Each takes x, w [B, 256] and unit [B, 1], as in `quantize_fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.blocks.pack import half, planes
from qcore.blocks.quantize_affine import AffineFit, fit_affine_runs
from qcore.blocks.quantize_fit import Steps, Uniform, fit

_Q3 = Uniform(-4, 3, [target + 0.1 * i for target in (-4, 3) for i in range(-9, 10)])
_Q6 = Uniform(-32, 31, [target + 0.25 * i for target in (-32, 31) for i in range(-6, 7)])


def _q2_k(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found = _affine_runs(x, w, unit, 16, 3, Steps(0, 1, 16))
    scales = found.scales.to(torch.uint8) | found.minima.to(torch.uint8) << 4
    codes = planes(found.codes.view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([scales, codes, half(found.d), half(found.dmin)], 1)


def _q3_k(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found = fit(x.view(-1, 16, 16), w.view(-1, 16, 16), unit, _Q3, Steps(-32, 1, 64))
    scales = found.codes.to(torch.uint8)
    codes = (found.levels.flatten(1) + 4).to(torch.uint8)
    return torch.cat(
        [
            planes((codes >> 2).view(-1, 8, 32), 1),
            planes((codes & 3).view(-1, 2, 4, 32), 2).flatten(1),
            planes((scales & 15).view(-1, 2, 8), 4),
            planes((scales >> 4).view(-1, 4, 4), 2),
            half(found.d),
        ],
        1,
    )


def _q4_k(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found = _affine_runs(x, w, unit, 8, 15, Steps(0, 1, 64))
    codes = planes(found.codes.view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([half(found.d), half(found.dmin), _scales_and_minima(found), codes], 1)


def _q5_k(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found = _affine_runs(x, w, unit, 8, 31, Steps(0, 1, 64))
    codes = found.codes.to(torch.uint8)
    low = planes((codes & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([half(found.d), half(found.dmin), _scales_and_minima(found), planes(codes >> 4, 1), low], 1)


def _q6_k(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found = fit(x.view(-1, 16, 16), w.view(-1, 16, 16), unit, _Q6, Steps(-128, 1, 256))
    codes = (found.levels.flatten(1) + 32).to(torch.uint8)
    low = planes((codes & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high = planes((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    scales = (found.codes - 128).to(torch.int8).view(torch.uint8)
    return torch.cat([low, high, scales, half(found.d)], 1)


def _affine_runs(x: Tensor, w: Tensor, unit: Tensor, runs: int, high: int, steps: Steps) -> AffineFit:
    return fit_affine_runs(x.view(-1, runs, 256 // runs), w.reshape(-1, runs, 256 // runs), unit, high, steps)


def _scales_and_minima(found: AffineFit) -> Tensor:
    """Eight scales and eight minima of six bits in 12 bytes, as kquants tells: uint8 [B, 12]."""
    (scales, more_scales), (minima, more_minima) = (
        part.to(torch.uint8).view(-1, 2, 4).unbind(1) for part in (found.scales, found.minima)
    )
    first = scales | (more_scales >> 4) << 6
    second = minima | (more_minima >> 4) << 6
    third = (more_scales & 15) | (more_minima & 15) << 4
    return torch.cat([first, second, third], 1)


SEARCH: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
)
