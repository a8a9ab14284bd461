"""Round to nearest: every weight becomes the nearest code under a scale that spans its group's range."""

from __future__ import annotations

import torch

from qcore.bits import pack
from qcore.elements import Float, Granularity, Group, Int, PerChannel, PerTensor
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme
from qcore.tensor import TORCH_FLOATS, QuantizedTensor


def rtn(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight: float [N, K]. Symmetric integers span [-max, max] with 2^bits - 1 steps, asymmetric ones [min(0, min), max(0, max)],
    under float16 scales, as most formats have them; floats map the largest magnitude to their largest value under float32 ones.

    Raises Refused (shape-unsupported) where groups do not divide K.
    """
    element, grid = scheme.weight.element, scheme.weight.scales[0].granularity
    values = _grouped(weight.to(torch.float32), grid)
    if isinstance(element, Float):
        dtype = TORCH_FLOATS[element.format]
        scale = _nonzero(values.abs().amax(-1, keepdim=True) / float(torch.finfo(dtype).max))
        codes, zeros = (values / scale).to(dtype), None
        return QuantizedTensor(scheme, tuple(weight.shape), codes.reshape(weight.shape), (_levels(scale, grid),), zeros)
    assert isinstance(element, Int)
    steps, middle = (1 << element.bits) - 1, 1 << (element.bits - 1)
    if scheme.weight.zero is None:
        if not element.signed:
            raise Refused(Refusal("scheme-unsupported", "never", "rtn", "unsigned codes without a zero point hold no negative weights",
                                  f"found {scheme}", "Use signed codes, or a zero point."))  # fmt: skip
        scale = _half(_nonzero(values.abs().amax(-1, keepdim=True) * 2 / steps))
        codes = (values / scale).round_().clamp_(-middle, middle - 1) + middle
        zeros = None
    else:
        low = values.amin(-1, keepdim=True).clamp(max=0)
        scale = _half(_nonzero((values.amax(-1, keepdim=True).clamp(min=0) - low) / steps))
        zero = (-low / scale).round_().clamp_(0, steps)
        codes = ((values / scale).round_() + zero).clamp_(0, steps)
        zeros = _levels(zero - middle, grid).to(torch.int8) if element.signed else _levels(zero, grid).to(torch.uint8)
    flat = codes.reshape(weight.shape).to(torch.uint8)
    if element.bits == 8:
        stored = (flat ^ 0x80).view(torch.int8) if element.signed else flat
    else:
        stored = pack(flat, element.bits)
    return QuantizedTensor(scheme, tuple(weight.shape), stored, (_levels(scale, grid),), zeros)


def _grouped(weight: torch.Tensor, grid: Granularity) -> torch.Tensor:
    """The weight with what shares a scale in the last dimension."""
    if isinstance(grid, PerTensor):
        return weight.reshape(1, 1, -1)
    if isinstance(grid, PerChannel):
        return weight.unsqueeze(1)
    assert isinstance(grid, Group)
    if weight.shape[-1] % grid.size:
        raise Refused(Refusal("shape-unsupported", "notimpl", "rtn", "groups must divide the input channels",
                              f"found {weight.shape[-1]} channels in groups of {grid.size}",
                              "Choose a group size that divides them, or channel."))  # fmt: skip
    grouped: torch.Tensor = weight.unflatten(-1, (-1, grid.size))
    return grouped


def _levels(part: torch.Tensor, grid: Granularity) -> torch.Tensor:
    """[N, G, 1] as scales are kept: [N, G]; one for the whole weight is [1, 1]."""
    levels: torch.Tensor = part.reshape(1, 1) if isinstance(grid, PerTensor) else part.squeeze(-1)
    return levels


def _half(scale: torch.Tensor) -> torch.Tensor:
    """In float16, upwards, so that no weight falls off the ends; scales that it does not hold at full precision stay."""
    span = torch.finfo(torch.float16)
    if bool((scale < span.smallest_normal).any() or (scale >= span.max).any()):
        return scale
    near = scale.half()
    return torch.where(near < scale, near.nextafter(torch.tensor(torch.inf, dtype=torch.float16)), near)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Zeros have no scale of their own; any will do."""
    filled: torch.Tensor = scale.masked_fill(scale == 0, 1.0)
    return filled
