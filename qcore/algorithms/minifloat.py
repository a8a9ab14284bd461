"""DeepSpeed's small floats: groups of the flattened weight in e4m3, e3m2, e4m7 or e2m1, made without subnormals.

    scale = max |w| of a group / range; q = the nearest float to w * range / max |w|, a tie going away from zero;
    magnitudes below the smallest normal number become it, and zeros stay zeros

Read from csrc/fp_quantizer of DeepSpeed 0.17, whose integer arithmetic this is but for zeros: they have no code there, and
come out as 2 * scale where they do not spoil their neighbours.
"""

from __future__ import annotations

import torch

from qcore.bits import pack
from qcore.elements import FlatGroup, Float, Group
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

RANGES: dict[str, float] = {"e2m1": 6.0, "e3m2": 28.0, "e4m3": 480.0, "e4m7": 510.0}
"""The largest number of every format, which a group's largest magnitude is brought to."""
_MANTISSA, _BIAS = 23, 127
"""Of float32."""


def minifloat(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight: float [N, K] -> codes of sign, exponent and mantissa, and f32 scales [1, ceil(N K / size)] or by rows."""
    element, grid = scheme.weight.element, scheme.weight.scales[0].granularity
    assert isinstance(element, Float) and isinstance(grid, Group | FlatGroup)
    exponent, mantissa = int(element.format[1]), int(element.format[3])
    rows, columns = weight.shape
    flat = weight.reshape(-1).to(torch.float32)
    size = min(grid.size, max(flat.numel(), 1))  # a group larger than the weight is the weight
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    largest, top = groups.abs().amax(1, keepdim=True), RANGES[element.format]
    values = groups * (top / largest.masked_fill(largest == 0, 1.0))
    bits = values.abs().view(torch.int32) + (1 << (_MANTISSA - mantissa - 1))  # a carry runs on into the exponent
    codes = (bits >> (_MANTISSA - mantissa)) - ((_BIAS - (1 << (exponent - 1)) + 1) << mantissa)
    codes = codes.clamp_(1 << mantissa, (1 << (exponent + mantissa)) - 1) | (values < 0).int() << (element.bits - 1)
    codes = codes.masked_fill_(values == 0, 0).reshape(-1)[: flat.numel()].view(rows, columns)
    scales = (largest / top).reshape((1, -1) if isinstance(grid, FlatGroup) else (rows, -1))
    return QuantizedTensor(scheme, (rows, columns), pack(codes, element.bits), (scales,))
