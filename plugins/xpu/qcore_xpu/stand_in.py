"""A stand-in for torch's operators on Intel GPUs, for hosts without one: the same names and signatures on the CPU, with the checks of torch's own
implementation (aten/src/ATen/native/mkldnn/xpu/Blas.cpp, ScaledBlas.cpp), and results by their documented formulas.

It shows that kernels call them as they want to be called; not what oneDNN makes of it. Loading it changes these operators for the whole process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch

from qcore_xpu.operators import OPERATORS

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def int4pack(
    x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """x [M, K], packed int32 [N, K / 8], scales [K / group, N] in x's type, zeros int8 [K / group, N]."""
    (_, columns), outputs = x.shape, len(packed)
    _check(x.dtype in _FLOATS and x.dim() == 2 and x.is_contiguous(), "x is a contiguous matrix of floats")
    _check(packed.dtype == torch.int32 and packed.shape == (outputs, columns // 8), "weights are int32 [N, K / 8]")
    _check(zeros.dtype == torch.int8 and scales.dtype == x.dtype, "zero points are int8, scales of x's type")
    _check(group > 1 and group % 32 == 0, "groups are multiples of 32")
    _check(scales.shape == zeros.shape == (columns // group, outputs), "scales and zero points are [K / group, N]")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts & 15).flatten(1).float().t()
    spread = [part.float().repeat_interleave(group, 0) for part in (scales, zeros)]
    return (x.float() @ ((codes - spread[1]) * spread[0])).to(x.dtype)


def int8pack(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [M, K], codes int8 [N, K], scales [N]."""
    _check(x.dtype in _FLOATS and x.dim() == 2 and x.stride(1) == 1, "x is a matrix of floats, contiguous along K")
    _check(
        codes.dtype == torch.int8 and codes.is_contiguous() and codes.shape[1] == x.shape[1], "codes are int8 [N, K]"
    )
    _check(scales.shape == (len(codes),), "scales are [N]")
    return (x.float() @ codes.float().t() * scales.float()).to(x.dtype)


def int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] times int8 [K, N]: int32."""
    _check(left.dtype == right.dtype == torch.int8, "both sides are int8")
    _check(left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0], "the sides are matrices that fit")
    return (left.double() @ right.double()).to(torch.int32)


def scaled_mm(
    left: torch.Tensor, right: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None, out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> torch.Tensor:  # fmt: skip
    """float8 [M, K] times float8 [K, N], scales of one number or of each row and column."""
    (rows, columns), outputs = left.shape, right.shape[1]
    _check(left.dtype in _FLOAT8 and right.dtype in _FLOAT8, "both sides are float8")
    _check(left.is_contiguous() and right.t().is_contiguous(), "the left side is row-major, the right one column-major")
    _check(columns % 16 == 0 and outputs % 16 == 0, "K and N are multiples of 16")
    whole = scale_a.numel() == scale_b.numel() == 1
    _check(
        whole or (scale_a.shape, scale_b.shape) == ((rows, 1), (1, outputs)), "scales are single, or [M, 1] and [1, N]"
    )
    _check(scale_a.dtype == scale_b.dtype == torch.float32, "scales are float32")
    out = left.float() @ right.float() * scale_a * scale_b
    return (out if bias is None else out + bias.float()).to(out_dtype or left.dtype)


_DOUBLES: dict[str, Callable[..., torch.Tensor]] = {
    "int4pack": int4pack, "int8pack": int8pack, "int_mm": int_mm, "scaled_mm": scaled_mm
}  # fmt: skip


@cache
def load() -> frozenset[str]:
    """Registers the operators, and returns the features that they stand for. Raises RuntimeError where there is an Intel GPU to run on."""
    if torch.xpu.is_available():
        raise RuntimeError("an Intel GPU is here: nothing stands in for it")
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that operators of the CPU are overridden
        for feature, double in _DOUBLES.items():
            library.impl(OPERATORS[feature], double, "CPU", allow_override=True)
    _KEPT.append(library)
    return frozenset(_DOUBLES)


_KEPT: list[torch.library.Library] = []
"""What is registered goes when its library does."""


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"torch's operator on Intel GPUs would not take this: {what}")
