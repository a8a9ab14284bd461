"""int8 x int8 in TorchAO's order of operations: codes are multiplied as integers, and the two scales follow.

Dequantizing both sides first gives the same numbers but for the last bit, and a last bit decides how the next layer rounds its
input: a whole model's perplexity moves by a percent. So float32 results are the tool's only in the tool's order.

Source: torchao's quantization/quantize_/workflows/int8/int8_tensor.py (linear) and quant_primitives.py (choose_qparams_affine,
quantize_affine).
"""

from __future__ import annotations

import torch

from qcore.elements import Int, PerChannel, PerTensor, PerToken
from qcore.kernels.divide import divide
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

_EPS = torch.finfo(torch.float32).eps
"""The least scale."""


def takes(scheme: Scheme) -> bool:
    """Whether the order exists: int8 on both sides, one scale for each output channel and for each token or tensor."""
    weight, given = scheme.weight, scheme.input
    return (
        given is not None
        and weight.element == given.element == Int(8, signed=True)
        and weight.zero is None
        and isinstance(weight.granularity, PerChannel | PerTensor)
        and isinstance(given.granularity, PerToken | PerTensor)
    )


def product(
    x: torch.Tensor, weight: QuantizedTensor, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """x: [..., K] in any float type. weight: int8 [N, K], of a scheme that is taken. scale, zero: [1], of static inputs.

    Returns [..., N] in x's type, without a bias.
    """
    given = weight.scheme.input
    assert given is not None
    values = x.reshape(-1, x.shape[-1]).to(torch.float32)
    if given.dynamic:
        reduced = values if isinstance(given.granularity, PerToken) else values.reshape(1, -1)
        low, high = reduced.amin(1, keepdim=True).clamp(max=0), reduced.amax(1, keepdim=True).clamp(min=0)
        if given.zero is None:
            scale = divide(torch.maximum(-low, high), 127.5).clamp(min=_EPS)
        else:
            scale = divide(high - low, 255).clamp(min=_EPS)
            zero = (-128 - (low / scale).round()).clamp(-128, 127)
    assert scale is not None, "a static scheme comes with its scale"
    scale, codes = scale.to(torch.float32), weight.codes
    shift = 0 if zero is None else zero.to(torch.float32)
    inputs = ((values * (1.0 / scale)).round() + shift).clamp(-128, 127)
    exact = torch.float32 if x.shape[-1] * 128 * 128 <= 1 << 24 else torch.float64  # sums are whole numbers
    sums = (inputs.to(exact) @ codes.to(exact).t()).to(torch.float32)
    out = (sums * scale).to(x.dtype)
    if zero is not None:
        out = out - (shift * scale * codes.sum(1, dtype=torch.float32)).to(x.dtype)
    return (out * weight.scales[0].to(torch.float32).flatten()).to(x.dtype).reshape(*x.shape[:-1], -1)
