"""What a scheme's quantized inputs stand for (qcore.kernels.activations), by operators that lower to Neuron's: for weights whose scales do not follow the sums."""

from __future__ import annotations

import torch

from qcore.elements import Float, Group
from qcore.kernels.divide import divide
from qcore.kernels.llm_int8 import PRODUCT
from qcore.kernels.minifloat import LARGEST
from qcore.scheme import TensorScheme
from qcore_neuron.kernels.rounding import (
    at_least,
    exponent,
    fp8_codes,
    half_to_even,
    int8_codes,
    on_grid,
    power_of_two,
    symmetric_scale,
)

_CARRY = {"e2m1": 1.75}
"""From this fraction of its power of two on, the largest of an MX group has the next exponent."""


def rounded_values(
    x: torch.Tensor, scheme: TensorScheme | None, scale: torch.Tensor | None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [..., K]. scale: float32 [1], of static inputs, and of NVFP4 that of the whole tensor. zero: float32 [1], of static inputs with a zero point."""
    if scheme is None:
        return x.to(torch.float32)
    if scheme.outliers is not None:
        return _without_outliers(x, scheme.outliers)
    if scheme.zero is not None:
        return _affine(x.to(torch.float32), scale, zero)
    if not isinstance(scheme.element, Float):
        codes, steps = int8_codes(x, scale)
        return codes * steps
    name, grid = scheme.element.format, scheme.granularity
    values = x.to(torch.float32)
    if isinstance(grid, Group):
        values = values.unflatten(-1, (-1, min(grid.size, x.shape[-1])))
    kind = scheme.scales[0].type
    if kind == "float":
        codes, steps = fp8_codes(values, scale)
    else:
        steps = _mx_scale(values, name) if kind == "e8m0" else _nv_scale(values, name, scale)
        codes = on_grid(values / steps, name)
    found = codes * steps
    return found.flatten(-2) if isinstance(grid, Group) else found


def _affine(values: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> torch.Tensor:
    """int8 with a zero point, of each row where none is stored."""
    if scale is None:
        low = -1.0 * (values * -1.0).amax(-1, keepdim=True).clamp_min(0.0)
        scale = symmetric_scale(values.amax(-1, keepdim=True).clamp_min(0.0) - low, 255.0)
        zero = half_to_even((-128.0 - low / scale).clamp(-128.0, 127.0))
    assert zero is not None
    return (half_to_even((values / scale + zero).clamp(-128.0, 127.0)) - zero) * scale


def _mx_scale(values: torch.Tensor, name: str) -> torch.Tensor:
    """Powers of two [..., 1]; groups of zeros take any."""
    largest = values.abs().amax(-1, keepdim=True).clamp_min(2.0**-120)
    own = exponent(largest)
    own = own + (largest >= power_of_two(own) * _CARRY[name]).to(torch.float32)
    top = 2.0 if name == "e2m1" else 8.0
    return power_of_two(own - top)


def _nv_scale(values: torch.Tensor, name: str, whole: torch.Tensor | None) -> torch.Tensor:
    largest = values.abs().amax(-1, keepdim=True)
    if whole is None:
        whole = symmetric_scale(largest.amax(), LARGEST[name] * LARGEST["e4m3fn"])
    fine = on_grid(divide(largest, LARGEST[name]) / whole, "e4m3fn")
    return (fine + (1.0 - torch.sign(fine)) * torch.finfo(torch.float8_e4m3fn).eps) * whole


def _without_outliers(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """LLM.int8 (qcore.kernels.llm_int8): columns in which a value reaches the threshold stay, the others are rounded to int8 in steps of each row."""
    most = torch.finfo(torch.float16).max
    narrow = x.reshape(-1, x.shape[-1]).clamp(-most, most).to(torch.float16).to(torch.float32)
    beyond = at_least(narrow.abs(), threshold)
    kept = beyond.amax(0, keepdim=True)
    inside = narrow * (1.0 - beyond)
    absmax = inside.abs().amax(1, keepdim=True)
    codes = half_to_even(inside * (127.0 / (absmax + 1.0 - torch.sign(absmax))))
    whole = codes * (absmax * (PRODUCT * 127.0))
    values = kept * x.reshape(narrow.shape).to(torch.float32) + (1.0 - kept) * whole
    return values.reshape(x.shape)
