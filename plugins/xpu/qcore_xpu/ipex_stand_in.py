"""A stand-in for operators of Intel Extension for PyTorch, for hosts without: the names and signatures that its XPU build registers, on the CPU, with the checks
and rules of its own implementation at v2.8.10+xpu (csrc/gpu/aten/operators/XEGEMM_INT4.cpp and fp8/FP8Linear.cpp, csrc/gpu/oneDNN/DnnlMatmulQuant.h and
FP8_Matmul.h), and results by their formulas. It shows that kernels call them as they want to be called; not what oneDNN makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from qcore_xpu.ipex import OPERATORS

_16_BITS = (torch.bfloat16, torch.float16)
_FLOATS = (*_16_BITS, torch.float32)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def mm_int4(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int, order: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    """x [M, K], packed int32 [K / 8, N], scales [K / group, N], zeros int8 [1] or int32 [K / group, N / 8], order [K]: w = (q - z) * s. On devices where
    oneDNN runs it."""
    columns, outputs = x.shape[1], packed.shape[1]
    groups = columns // group
    _check(x.dtype in _16_BITS and x.stride(1) == 1, "x is in 16 bits, contiguous along K")
    _check(packed.dtype == torch.int32 and packed.shape[0] * 8 == columns, "weights are int32 [K / 8, N]")
    _check(packed.t().is_contiguous(), "weights are contiguous along K")
    _check(group % 32 == 0 and columns % group == 0, "groups are multiples of 32, and all whole")
    _check(scales.shape == (groups, outputs) and scales.is_contiguous(), "scales are [K / group, N]")
    _check(scales.dtype == x.dtype, "scales are of x's type: the compiled product is cached without theirs")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    if zeros.dim() == 1:
        _check(zeros.dtype == torch.int8 and zeros.numel() == 1, "a zero point for all is int8 [1]")
        zero = zeros.float()
    else:
        _check(
            zeros.dtype == torch.int32 and zeros.shape == (groups, outputs // 8), "zero points are int32 [K / g, N / 8]"
        )
        _check(outputs % 8 == 0 and zeros.is_contiguous(), "zero points fill whole words")
        zero = (zeros.unsqueeze(-1) >> shifts & 15).flatten(1).float().repeat_interleave(group, 0)
    codes = (packed.unsqueeze(1) >> shifts[:, None] & 15).reshape(columns, outputs).float()
    weight = (codes - zero) * scales.float().repeat_interleave(group, 0)
    if order is not None:
        _check(order.dtype in (torch.int32, torch.int64) and order.shape == (columns,), "the order is integers [K]")
        x = x.index_select(-1, order)
    return (x.float() @ weight).to(x.dtype)


def fp8_gemm_w8a16(
    x: torch.Tensor, codes: torch.Tensor, transposed: bool, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, K], codes float8 [N, K] where transposed, [K, N] where not, one scale, bias [N]."""
    columns, outputs = x.shape[1], codes.shape[0 if transposed else 1]
    _check(x.dtype in _16_BITS and codes.dtype in _FLOAT8, "x is in 16 bits, weights are float8")
    _check(codes.shape == ((outputs, columns) if transposed else (columns, outputs)), "weights fit x")
    _check(1 in codes.stride(), "weights are contiguous along one side")
    _check(x.stride(1) == 1 and x.stride(0) > 0 and x.stride(0) % columns == 0, "rows of x lie whole rows apart")
    _check(scale is None or (scale.numel() == 1 and scale.dtype in _FLOATS), "there is one scale for the tensor")
    out = x.float() @ (codes.t() if transposed else codes).float() * (1 if scale is None else scale.float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def fp8_gemm(
    left: torch.Tensor, left_transposed: bool, right: torch.Tensor, right_transposed: bool, added: torch.Tensor | None, dtype: torch.dtype,
    left_scale: torch.Tensor | None, right_scale: torch.Tensor | None, bias: torch.Tensor | None, accumulate: bool,
) -> torch.Tensor:  # fmt: skip
    """left [M, K], right [K, N], one scale for each. What it transposes is the caller's own tensor."""
    for side, turned in ((left, left_transposed), (right, right_transposed)):
        if turned:
            side.transpose_(0, 1)
    _check(added is None, "nothing is added but a bias")
    _check(left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0], "the sides are matrices that fit")
    _check(left.dtype in (*_FLOAT8, *_FLOATS) and right.dtype in _FLOAT8, "the right side is float8")
    _check(1 in left.stride() and 1 in right.stride(), "both are contiguous along one side")
    _check(all(s is None or s.numel() == 1 for s in (left_scale, right_scale)), "each side has one scale")
    out = left.float() @ right.float()
    for scale in (left_scale, right_scale):
        out = out if scale is None else out * scale.float()
    return (out if bias is None else out + bias.float()).to(dtype)


_DOUBLES: dict[str, tuple[str, str, Callable[..., torch.Tensor]]] = {
    "ipex_int4": ("(Tensor _0, Tensor _1, Tensor _2, Tensor _3, int _4, Tensor? _5) -> Tensor", "CompositeImplicitAutograd", mm_int4),
    "ipex_fp8_w8a16": ("(Tensor _0, Tensor _1, bool _2, Tensor? _3, Tensor? _4) -> Tensor", "CPU", fp8_gemm_w8a16),
    "ipex_fp8": ("(Tensor _0, bool _1, Tensor _2, bool _3, Tensor? _4, ScalarType _5, Tensor? _6, Tensor? _7, Tensor? _8, bool _9) -> Tensor", "CPU", fp8_gemm),
}  # fmt: skip
"""Signatures as they are inferred from C++, without names; the dispatch key, CPU for XPU; and what answers."""


@cache
def load() -> frozenset[str]:
    """Registers the operators, and returns the features that they stand for. Raises RuntimeError where there is an Intel GPU or the extension's XPU build."""
    if torch.xpu.is_available():
        raise RuntimeError("an Intel GPU is here: nothing stands in for it")
    library = torch.library.Library("torch_ipex", "FRAGMENT")
    for feature, (signature, key, double) in _DOUBLES.items():
        library.define(OPERATORS[feature] + signature)
        library.impl(OPERATORS[feature], double, key)
    _KEPT.append(library)
    return frozenset(_DOUBLES)


_KEPT: list[torch.library.Library] = []
"""What is registered goes when its library does."""


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"the extension's operator would not take this: {what}")
