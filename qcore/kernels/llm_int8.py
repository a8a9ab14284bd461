"""LLM.int8 (Dettmers et al. 2022), operation by operation as bitsandbytes computes it.

Input columns in which a value of the batch reaches the threshold meet the dequantized weight; the rest of each row is rounded
to float16, then to int8 under absmax / 127 of all that is below the threshold in the row, and meets the weight's codes in
integers. Which order float operations have matters: a code that falls to the other side moves whole answers.

Source: bitsandbytes' backends/default/ops.py and autograd/_functions.py (MatMul8bitLt).
"""

from __future__ import annotations

import torch

from qcore.elements import Int, PerChannel
from qcore.tensor import QuantizedTensor

PRODUCT = 6.200124e-05
"""What bitsandbytes multiplies a sum of products of codes with on a CPU; 1 / 127^2 is 6.2000124e-05."""
_STEP = 7.874015718698502e-3
"""1 / 127."""


def by_channel(weight: QuantizedTensor) -> bool:
    """Whether `product` takes the weight: bitsandbytes has no other."""
    scheme = weight.scheme.weight
    return scheme.element == Int(8, signed=True) and isinstance(scheme.granularity, PerChannel) and scheme.zero is None


def split(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: [..., K]. Codes float32 [T, K], which are whole numbers; each row's absmax, float32 [T, 1]; whether a column
    is kept as it is, bool [K]."""
    narrow = x.reshape(-1, x.shape[-1]).to(torch.float16)
    beyond = narrow.abs() >= threshold
    kept = beyond.any(0)
    inside = narrow.masked_fill(beyond, 0)
    absmax = inside.abs().amax(1, keepdim=True).to(torch.float32)
    codes = (inside * (127.0 / absmax)).round_().nan_to_num_(0.0)  # a row of zeros has none
    return codes.masked_fill_(kept, 0), absmax, kept


def rounded(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """What the quantized input stands for beside a dequantized weight: x's shape, float32."""
    codes, absmax, kept = split(x, threshold)
    whole = codes * (absmax * (PRODUCT * 127.0))
    return torch.where(kept, x.reshape(codes.shape).to(torch.float32), whole).reshape(x.shape)


def product(x: torch.Tensor, weight: QuantizedTensor, threshold: float) -> torch.Tensor:
    """x: [..., K] in any float type. weight: int8 [N, K] by channel. Returns [..., N] in x's type, without a bias."""
    codes, absmax, kept = split(x, threshold)
    exact = torch.float32 if x.shape[-1] * 127 * 127 < 1 << 24 else torch.float64  # sums are whole numbers
    sums = (codes.to(exact) @ weight.codes.to(exact).t()).to(torch.float32)
    largest = (weight.scales[0].double() * 127).to(torch.float32).t()
    out = (sums * (absmax * largest) * PRODUCT).to(x.dtype)
    if bool(kept.any()):
        columns = weight.codes[:, kept] * largest.t() * _STEP
        out = out.addmm(x.reshape(codes.shape)[:, kept], columns.to(x.dtype).t())
    return out.reshape(*x.shape[:-1], -1)
