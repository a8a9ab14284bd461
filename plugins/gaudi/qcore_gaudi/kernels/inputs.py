"""Rounding a layer's input as its scheme says, by operators that Gaudi has.

What is rounded to integers or to e4m3 under one scale for each row, or for all, is given as codes, which bfloat16 holds exactly, and the scale apart: it
follows the sums. Under scales by group codes are multiplied by them first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Float, Group, PerToken
from qcore.kernels.divide import divide
from qcore.kernels.llm_int8 import PRODUCT
from qcore_gaudi.kernels import e4m3

if TYPE_CHECKING:
    from qcore.scheme import TensorScheme

_LEAST = torch.finfo(torch.float32).eps
"""The scale of a row of zeros, as compressed-tensors has it; any would do."""
_E2M1 = 6.0
_E4M3 = 448.0


def rounded(
    x: torch.Tensor, scheme: TensorScheme, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x: [M, K], of one row at least. scale, zero: [1], where they are stored; of NVFP4 the scale of the whole tensor. What x stands for is the first result,
    float32 [M, K] of which bfloat16 loses nothing or 2^-9, times the second, float32 [M, 1] or [1] where there is one."""
    values = x.to(torch.float32)
    if scheme.outliers is not None:
        return _without_outliers(x, scheme.outliers), None
    if isinstance(scheme.granularity, Group):
        return _groups(values, scheme, scheme.granularity.size, scale)
    by_row = isinstance(scheme.granularity, PerToken)
    if isinstance(scheme.element, Float):
        codes, scale = e4m3.rounded(values, scale_of(values, scheme) if scheme.dynamic else scale)
        return e4m3.from_codes(codes, torch.float32), scale
    steps = 2**scheme.bits - 1
    least, most = -(steps + 1) // 2, steps // 2
    if scheme.dynamic and scheme.zero is None:
        scale = _absmax(values, by_row, steps / 2)
    elif scheme.dynamic:
        low, high = _reduced(-values, by_row).clamp(min=0), _reduced(values, by_row).clamp(min=0)
        scale = divide(low + high, steps)
        scale = torch.where(scale == 0, _LEAST, scale)
        zero = (least + low / scale).clamp(least, most).round()
    assert scale is not None
    codes = values / scale
    if zero is None:
        return codes.clamp(least, most).round(), scale
    shift = zero.to(torch.float32)
    return (codes + shift).clamp(least, most).round() - shift, scale


def scale_of(values: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """The run-time scales of e4m3 inputs, [M, 1] or [1, 1]: of rows, or of all; groups are to be rows."""
    by_row, kind = isinstance(scheme.granularity, PerToken | Group), scheme.scales[0].type
    if kind == "float":
        return _absmax(values, by_row, _E4M3)
    return _power_of_two(_reduced(values.abs(), by_row), _E4M3, kind)


def _reduced(values: torch.Tensor, by_row: bool) -> torch.Tensor:
    """The largest of each row [M, 1], or of all [1, 1]."""
    rows = values.amax(-1, keepdim=True)
    return rows if by_row else rows.amax(0, keepdim=True)


def _absmax(values: torch.Tensor, by_row: bool, steps: float) -> torch.Tensor:
    scale = divide(_reduced(values.abs(), by_row), steps)
    return torch.where(scale == 0, _LEAST, scale)


def _groups(
    values: torch.Tensor, scheme: TensorScheme, size: int, whole: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Small floats under scales by group: floats, powers of two (MX), or e4m3 under one for the tensor (NVFP4)."""
    columns = values.shape[-1]
    size = min(size, columns)
    grouped = torch.nn.functional.pad(values, (0, -columns % size)).reshape(-1, size)
    magnitude = grouped.abs().amax(-1, keepdim=True)
    kind = scheme.scales[0].type
    assert isinstance(scheme.element, Float)
    small = scheme.element.format == "e2m1"
    largest = _E2M1 if small else _E4M3
    factor = None
    if kind.startswith("e8m0"):
        scale = _power_of_two(magnitude, largest, kind)
    elif kind == "e4m3fn":
        factor = _absmax(values, False, largest * _E4M3) if whole is None else whole.to(torch.float32)
        fine = e4m3.from_bytes(e4m3.to_bytes(divide(magnitude, largest) / factor))
        scale = torch.where(fine == 0, torch.finfo(torch.float8_e4m3fn).eps, fine)
    else:
        scale = divide(magnitude, largest)
        scale = torch.where(scale == 0, _LEAST, scale)
    if small:
        # Coarse scale and fine one first, as the definition has it: which codes halves go to depends on it.
        stands_for = _e2m1(grouped / (scale if factor is None else scale * factor)) * scale
    else:
        codes, scale = e4m3.rounded(grouped, scale)
        stands_for = e4m3.from_codes(codes, torch.float32) * scale
    return stands_for.reshape(len(values), -1)[:, :columns], factor


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((values / step).round() * step).clamp(-_E2M1, _E2M1)


def _power_of_two(magnitude: torch.Tensor, largest: float, kind: str) -> torch.Tensor:
    """Scales 2^-126 .. 2^127 of MX, as qcore/kernels/minifloat.py has them. Made of bits: logarithms and powers are not exact everywhere.

    e8m0: the magnitude's exponent, or the next where its mantissa is 1.75 at least, less that of the largest number; e8m0floor: never the next. e8m0ceil: the
    least power of two under which nothing is clipped.
    """
    if kind == "e8m0ceil":
        exponents = divide(magnitude, largest).view(torch.int32) + ((1 << 23) - 1) >> 23
    else:
        carry = 1 << 21 if kind == "e8m0" else 0
        exponents = (magnitude.view(torch.int32) + carry >> 23) + (-2 if largest == _E2M1 else -8)
    return (exponents.clamp(1, 254) << 23).view(torch.float32)


def _without_outliers(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """LLM.int8 (qcore/kernels/llm_int8.py) without a shape that depends on values: columns with an outlier stay as they are."""
    narrow = x.to(torch.float16).to(torch.float32)
    beyond = narrow.abs() >= threshold
    inside = torch.where(beyond, 0.0, narrow)
    absmax = inside.abs().amax(1, keepdim=True)
    codes = (inside * torch.where(absmax == 0, 0.0, 127.0 / absmax)).round()
    return torch.where(beyond.any(0, keepdim=True), x.to(torch.float32), codes * (absmax * (PRODUCT * 127.0)))
