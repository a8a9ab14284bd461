"""Small floats as activations: rounding to a format's grid, and the scales of MX and NVFP4 groups at run time.

MX (OCP Microscaling Formats v1.0, section 6.3) leaves open how the shared exponent is rounded, and tools differ:

    e8m0       the largest magnitude is first rounded to the element's mantissa, so that the 7 of a group in e2m1, which 6
               is far from, takes the next exponent (compressed-tensors, Quark; torchao's EVEN)
    e8m0floor  its exponent, less that of the element's largest number (the OCP's own example, AutoRound; FLOOR)
    e8m0ceil   the least power of two under which nothing is clipped (cuBLAS; RCEIL)

NVFP4 scales are e4m3 under one float for the tensor.
"""

from __future__ import annotations

import torch

from qcore.kernels.divide import divide

_MANTISSA_BITS = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3fn": 3, "e4m3fnuz": 3, "e5m2": 2}
_LEAST_EXPONENT = {"e2m1": 0, "e2m3": 0, "e3m2": -2, "e4m3fn": -6, "e4m3fnuz": -7, "e5m2": -14}
"""Exponent of the smallest normal number."""
LARGEST = {"e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3fn": 448.0, "e4m3fnuz": 240.0, "e5m2": 57344.0}
_CARRY_BITS = _MANTISSA_BITS | {"e4m3fn": 1}
"""Mantissa bits to which a group's maximum is rounded before its exponent is taken: e4m3's largest number is 1.75 * 2^8,
and what lies above that takes the next exponent."""


def round_to(values: torch.Tensor, name: str) -> torch.Tensor:
    """float32 `values` rounded to the format's nearest number, ties to even; beyond its largest they saturate."""
    exponent = torch.frexp(values)[1] - 1
    step = torch.ldexp(torch.ones_like(values), exponent.clamp(min=_LEAST_EXPONENT[name]) - _MANTISSA_BITS[name])
    return ((values / step).round_() * step).clamp_(-LARGEST[name], LARGEST[name])


def mx_scale(magnitude: torch.Tensor, name: str, kind: str = "e8m0") -> torch.Tensor:
    """Power-of-two scales for groups whose largest magnitudes are given: 2^-127 .. 2^127."""
    if kind == "e8m0ceil":
        fraction, exponent = torch.frexp(divide(magnitude, LARGEST[name]))
        exponent = torch.where(magnitude == 0, -127, exponent - (fraction == 0.5).int())
        return torch.ldexp(torch.ones_like(magnitude), exponent.clamp(-127, 127))
    carry = 1 << (22 - _CARRY_BITS[name]) if kind == "e8m0" else 0
    carried = magnitude.to(torch.float32).contiguous().view(torch.int32) + carry
    largest = torch.frexp(torch.tensor(LARGEST[name]))[1].item() - 1
    exponent = (carried >> 23) - 127 - int(largest)
    return torch.ldexp(torch.ones_like(magnitude), exponent.clamp(-127, 127))


def nv_scale(magnitude: torch.Tensor, name: str, whole: torch.Tensor) -> torch.Tensor:
    """Effective scales of groups: e4m3 numbers under the tensor's own scale `whole`."""
    fine = (divide(magnitude, LARGEST[name]) / whole).clamp(max=LARGEST["e4m3fn"])
    stored = fine.to(torch.float8_e4m3fn).to(torch.float32)
    return torch.where(stored == 0, torch.finfo(torch.float8_e4m3fn).eps, stored) * whole
