"""The kv cache's reference kernel: keys or values to bytes and back, in torch's own operators.

Integers are rounded half to even, then shifted by their zero point; floats go to the nearest code; both saturate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Element, Float
from qcore.kernels.divide import divide
from qcore.kernels.inverses import static_inverse

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors, Order

_FLOATS = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SCALE_BYTES = 4


class KvRounding(torch.nn.Module):
    """scale, zero: float32, of any shape that spreads over the states ([1], or [heads, 1, 1]); scale None is dynamic, one for
    each token and head, whose four bytes follow the codes of a row."""

    scale: torch.Tensor | None
    zero: torch.Tensor | None
    inverse: torch.Tensor | None

    def __init__(
        self,
        element: Element,
        scale: torch.Tensor | None = None,
        zero: torch.Tensor | None = None,
        order: Order = "dequantized",
    ) -> None:
        super().__init__()
        self.element = element
        inverse = None
        if order == "inverses" and scale is not None and isinstance(element, Float):
            inverse = static_inverse(scale, element.format)
            scale = inverse.reciprocal()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("inverse", inverse)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> KvRounding:
        """Of a weight [heads, head_dim] that stands for one token: its scheme, scales and zero points."""
        weight = layer.weight
        zero = None if weight.zeros is None else weight.zeros.to(torch.float32)
        return cls(weight.scheme.weight.element, weight.scales[0].to(torch.float32), zero, layer.order)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What attention sees of the states."""
        return self.decode(self.encode(states), states.dtype)

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        """float [..., head_dim] -> uint8 rows. Values out of range saturate."""
        self._follow(states.device)
        wide = states.to(torch.float32)
        scale = self._dynamic(wide) if self.scale is None else self.scale
        scaled = wide / scale if self.inverse is None else wide * self.inverse
        if isinstance(self.element, Float):
            kind = _FLOATS[self.element.format]
            most = torch.finfo(kind).max
            codes = scaled.clamp(-most, most).to(kind).view(torch.uint8)
        else:
            shifted = scaled.round() if self.zero is None else scaled.round() + self.zero
            codes = shifted.clamp(-128, 127).to(torch.int8).view(torch.uint8)
        return codes if self.scale is not None else torch.cat([codes, scale.view(torch.uint8)], -1)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that the rows stand for, in the dtype to compute in."""
        self._follow(rows.device)
        scale = self.scale
        if scale is None:
            rows, tail = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:]
            scale = tail.contiguous().view(torch.float32)
        kind = _FLOATS[self.element.format] if isinstance(self.element, Float) else torch.int8
        wide = rows.view(kind).to(torch.float32)
        return ((wide if self.zero is None else wide - self.zero) * scale).to(dtype)

    def _dynamic(self, wide: torch.Tensor) -> torch.Tensor:
        """Absmax of each row over the largest code, [..., 1]; rows of zeros take any scale."""
        most = torch.finfo(_FLOATS[self.element.format]).max if isinstance(self.element, Float) else 127.0
        return divide(wide.abs().amax(-1, keepdim=True), most).clamp_min(torch.finfo(torch.float32).tiny)

    def _follow(self, device: torch.device) -> None:
        """Scales go to the cache's device once, not at each call."""
        if self.scale is not None and self.scale.device != device:
            self.to(device)
