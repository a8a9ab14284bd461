"""Float inputs that are multiplied by the inverse of their scale, and codes by the inverse of that: how two tools run their models.

    fp8     m = 448 / max                                     x = round(x m) (1 / m)   ModelOpt (tensor_quant.py, _fp8_eager)
    NVFP4   s = e4m3(G (max (1 / 6)))   m = 1 / (s (1 / G))   x = round(x m) (1 / m)   AutoRound (data_type/nvfp.py)

Each operation is rounded to float32. The files hold max / 448 and G, the inverse of the scale of the whole tensor.
"""

from __future__ import annotations

import torch

from qcore.elements import Float, Group, PerToken
from qcore.kernels.minifloat import LARGEST, round_to
from qcore.scheme import TensorScheme

_LEAST = 2.0**-24
"""Inputs no larger than this are rounded as if their largest were 1."""


def round_trip(values: torch.Tensor, scheme: TensorScheme, scale: torch.Tensor | None) -> torch.Tensor:
    """float32 values [..., K], or [..., groups, size], as their codes stand for them. scale: of the file, for static fp8 and NVFP4."""
    assert isinstance(scheme.element, Float), "only floats are rounded so"
    name = scheme.element.format
    if isinstance(scheme.granularity, Group):
        inverse = _of_nvfp4(_largest(values), name, scale)
    elif scheme.dynamic:
        inverse = _of_fp8(_largest(values) if isinstance(scheme.granularity, PerToken) else values.abs().amax(), name)
    else:
        assert scale is not None, "a static scheme comes with its scale"
        inverse = static_inverse(scale, name)
    return round_to(values * inverse, name) * _invert(inverse)


def static_inverse(scale: torch.Tensor, name: str) -> torch.Tensor:
    """What inputs are multiplied by, of the scale max / 448 in a file."""
    return _of_fp8(scale.to(torch.float32) * LARGEST[name], name)


def _of_fp8(largest: torch.Tensor, name: str) -> torch.Tensor:
    return LARGEST[name] * torch.where(largest <= _LEAST, 1.0, largest).reciprocal()


def _of_nvfp4(largest: torch.Tensor, name: str, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        divisor = LARGEST["e4m3fn"] * LARGEST[name] * _invert(largest.amax())
    else:
        divisor = scale.to(torch.float64).reciprocal().to(torch.float32)
    fine = divisor * (largest * (1 / LARGEST[name]))
    stored = fine.clamp(max=LARGEST["e4m3fn"]).to(torch.float8_e4m3fn).to(torch.float32)
    return _invert(stored * _invert(divisor))


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.abs().amax(-1, keepdim=True)


def _invert(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values == 0, 0.0, values.reciprocal())
