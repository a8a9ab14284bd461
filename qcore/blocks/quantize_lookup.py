"""Encoders of the table types: the inverse of `lookup`. x, w: float32 [B, elements], unit [B, 1], as in `quantize_fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.blocks.lookup import FP4_DOUBLED, IQ4
from qcore.blocks.pack import half, neighbours, planes
from qcore.blocks.quantize_fit import Steps, Table, choose, fit, fit_scale, inverse_of

_IQ4_TABLE = Table(IQ4, [target + 4.0 * i for target in (-127, 113) for i in range(-9, 10)])
_FP4_TABLE = Table(FP4_DOUBLED, [5.0 + 0.5 * i for i in range(20)])


def _iq4_nl(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found = fit(x.unsqueeze(1), w.unsqueeze(1), unit, _IQ4_TABLE)
    return torch.cat([half(found.d), planes(_IQ4_TABLE.codes(found.levels).view(-1, 2, 16), 4)], 1)


def _iq4_xs(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    found = fit(x.view(-1, 8, 32), w.reshape(-1, 8, 32), unit, _IQ4_TABLE, Steps(-32, 1, 64))
    scales = found.codes.to(torch.uint8)
    codes = planes(_IQ4_TABLE.codes(found.levels).view(-1, 8, 2, 16), 4).flatten(1)
    return torch.cat([half(found.d), neighbours(scales >> 4, 2), neighbours(scales & 15, 4), codes], 1)


def _mxfp4_reference(x: Tensor) -> Tensor:
    """The OCP specification's exponent, floor(log2(largest)) - 2, and the nearest codes."""
    return _mxfp4_at(x, x.abs().amax(1, keepdim=True).log2().floor() - 2 + 127)[1]


def _mxfp4(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    x = x * unit
    first = x.abs().amax(1, keepdim=True).log2().floor() - 2 + 127
    best: Tensor | None = None
    least = torch.full_like(unit, torch.inf)
    for offset in (0, -1, 1):
        values, blocks = _mxfp4_at(x, first + offset)
        error = ((values - x) / unit).square_().mul_(w).sum(1, keepdim=True)
        best = blocks if best is None else choose(error < least, blocks, best)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _mxfp4_at(x: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Values and blocks at given exponents [B, 1], which are cut to 0..254."""
    exponents = exponents.clamp(0, 254)
    half_scale = (exponents - 128).double().exp2().float()  # float32's own exp2 is inexact and loses denormals
    levels = _FP4_TABLE.nearest(x / half_scale, x)
    codes = planes(_FP4_TABLE.codes(levels).view(-1, 2, 16), 4)
    return levels * half_scale, torch.cat([exponents.to(torch.uint8), codes], 1)


def _nvfp4(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
    """Every run has a scale of its own, one of e4m3's 126 positive values."""
    x, w = x.view(-1, 4, 16), w.reshape(-1, 4, 16)
    table = torch.arange(127, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn).float() / 2
    scale = fit_scale(x, w, _FP4_TABLE)[0].squeeze(-1).abs() * unit  # of the extreme's sign, which the codes can hold
    near = torch.searchsorted(table, scale.contiguous()).clamp_(max=126)
    best = torch.zeros_like(near), torch.zeros_like(x), torch.full_like(scale, torch.inf)
    for offset in (0, -2, -1, 1):  # near is the value above, so -1 is the one below
        codes = (near + offset).clamp_(0, 126)
        found = (table[codes] / unit).unsqueeze(-1)
        levels = _FP4_TABLE.nearest(x * inverse_of(found), w)
        error = (x - found * levels).square_().mul_(w).sum(-1)
        better = error < best[2]
        best = choose(better, codes, best[0]), choose(better, levels, best[1]), choose(better, error, best[2])
    packed = planes(_FP4_TABLE.codes(best[1]).view(-1, 4, 2, 8), 4).flatten(1)
    return torch.cat([best[0].to(torch.uint8), packed], 1)


REFERENCE: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"mxfp4": _mxfp4_reference})
SEARCH: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs, "mxfp4": _mxfp4, "nvfp4": _nvfp4}
)
