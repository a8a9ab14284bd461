"""Quantizing a layer's input: what a scheme's input part means.

The arithmetic is compressed-tensors' (quantization/utils/helpers.py, calculate_qparams), in float32: a symmetric scale
is absmax / 127.5 for int8 and absmax / 448 for fp8; values are divided by it, clamped, and rounded half to even. Groups
of small floats have MX's or NVFP4's scales (qcore/kernels/minifloat.py). Where a scheme keeps outliers apart it is
LLM.int8's (qcore/kernels/llm_int8.py).
"""

from __future__ import annotations

import torch

from qcore.elements import Float, Group, Int, PerToken
from qcore.kernels import inverses
from qcore.kernels.divide import divide
from qcore.kernels.llm_int8 import rounded
from qcore.kernels.minifloat import LARGEST, mx_scale, nv_scale, round_to
from qcore.scheme import TensorScheme
from qcore.tensor import Order


def quantize_input(
    x: torch.Tensor,
    scheme: TensorScheme,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    order: Order = "dequantized",
) -> torch.Tensor:
    """The values that the quantized input stands for: x rounded to the scheme and back, in x's shape and dtype.

    x: [..., K]. scale, zero: [1], for static schemes; of NVFP4 the scale of the whole tensor, taken from x if absent.
    """
    if not x.numel():  # nothing to find a range of
        return x
    values = x.to(torch.float32)
    if scheme.outliers is not None:
        return rounded(x, scheme.outliers).to(x.dtype)
    granularity = scheme.granularity
    if isinstance(granularity, Group):
        size = min(granularity.size, values.shape[-1])  # a file may state groups that are far larger than the input
        values = torch.nn.functional.pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size))
    if order == "inverses":
        stands_for = inverses.round_trip(values, scheme, scale)
    else:
        if scheme.dynamic:
            reduced = values if isinstance(granularity, PerToken | Group) else values.reshape(1, -1)
            scale, zero = _range(reduced, scheme, scale)
        assert scale is not None, "a static scheme comes with its scale"
        stands_for = _round_trip(values, scheme, scale.to(torch.float32), zero, order)
    if isinstance(granularity, Group):
        stands_for = stands_for.flatten(-2)[..., : x.shape[-1]]
    return stands_for.to(x.dtype)


def dynamic_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of each row and their scales: int8 [..., K] and float32 [..., 1]."""
    values = x.to(torch.float32)
    scale, _ = _symmetric(values.abs().amax(-1, keepdim=True), 127.5)
    return (values / scale).clamp_(-128, 127).round_().to(torch.int8), scale


def static_int8(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes under a stored scale [1]: int8 [..., K], and the scale in float32."""
    wide = scale.to(torch.float32)
    return (x.to(torch.float32) / wide).clamp_(-128, 127).round_().to(torch.int8), wide


def dynamic_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of each row and their scales: float8_e4m3fn [..., K] and float32 [..., 1]."""
    scale, _ = _symmetric(x.to(torch.float32).abs().amax(-1, keepdim=True), LARGEST["e4m3fn"])
    return static_fp8(x, scale)


def static_fp8(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes under given scales, which saturate: float8_e4m3fn [..., K], and the scales in float32."""
    wide, most = scale.to(torch.float32), LARGEST["e4m3fn"]
    return (x.to(torch.float32) / wide).clamp_(-most, most).to(torch.float8_e4m3fn), wide


def _range(
    values: torch.Tensor, scheme: TensorScheme, whole: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point over the last dimension; `whole` is the stored scale of the tensor, where the scheme has one."""
    if scheme.zero is None:
        magnitude = values.abs().amax(-1, keepdim=True)
        if scheme.bound is not None:
            magnitude = magnitude.clamp(max=scheme.bound)
        if not isinstance(scheme.element, Float):
            return _symmetric(magnitude, (2**scheme.bits - 1) / 2)
        name, kind = scheme.element.format, scheme.scales[0].type
        if kind.startswith("e8m0"):
            return mx_scale(magnitude, name, kind), None
        if kind == "e4m3fn":
            if whole is None:
                whole, _ = _symmetric(magnitude.amax(), LARGEST[name] * LARGEST[kind])
            return nv_scale(magnitude, name, whole.to(torch.float32)), None
        return _symmetric(magnitude, LARGEST[name])
    low = values.amin(-1, keepdim=True).clamp(max=0)
    high = values.amax(-1, keepdim=True).clamp(min=0)
    least, most = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    scale, _ = _symmetric(high - low, 2**scheme.bits - 1)
    return scale, (least - low / scale).clamp(least, most).round()


def _symmetric(magnitude: torch.Tensor, steps: float) -> tuple[torch.Tensor, None]:
    scale = divide(magnitude, steps)
    # A row of zeros has no scale of its own; any number will do, and this is compressed-tensors'.
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale), None


def _round_trip(
    values: torch.Tensor, scheme: TensorScheme, scale: torch.Tensor, zero: torch.Tensor | None, order: Order
) -> torch.Tensor:
    scaled = values / scale if order == "dequantized" else values * (1.0 / scale)
    if isinstance(scheme.element, Float):
        return round_to(scaled, scheme.element.format) * scale
    assert isinstance(scheme.element, Int)
    least, most = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if zero is None:
        return scaled.clamp(least, most).round() * scale
    shift = zero.to(torch.float32)
    if order != "dequantized":
        return ((scaled.round() + shift).clamp(least, most) - shift) * scale
    return ((scaled + shift).clamp(least, most).round() - shift) * scale
