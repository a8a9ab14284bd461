"""The kv cache in 8 bits. Codes are made and read as numbers: torch-xla leaves views of bytes as another type to the CPU, and e4m3's numbers above 240 are none on most
chips. Bytes are those that the codes have everywhere."""

from __future__ import annotations

import torch

from qcore.elements import Float
from qcore.kernels.kv_cache import KvRounding
from qcore_neuron.kernels.floats import numbers
from qcore_neuron.kernels.rounding import at_least, exponent, half_to_even, octaves, power_of_two

_LARGEST = {"e4m3fn": 448.0, "e5m2": 57344.0}
_STEPS = {"e4m3fn": 8.0, "e5m2": 4.0}
"""Numbers in an octave."""


class KvCache(KvRounding):
    """What KvRounding does, to the byte but for negative zeros."""

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        self._follow(states.device)
        wide = states.to(torch.float32)
        scale = self._dynamic(wide) if self.scale is None else self.scale
        scaled = wide / scale if self.inverse is None else wide * self.inverse
        if isinstance(self.element, Float):
            rows = _float_bytes(scaled, self.element.format)
        else:
            whole = half_to_even(scaled.clamp(-1024.0, 1024.0))  # beyond which zero points change nothing
            codes = (whole if self.zero is None else whole + self.zero).clamp(-128.0, 127.0)
            rows = codes + 256.0 * (1.0 - at_least(codes, 0.0))
        if self.scale is None:
            rows = torch.cat([rows, scale_bytes(scale)], -1)
        return rows.to(torch.uint8)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self._follow(rows.device)
        codes, scale = rows.to(torch.float32), self.scale
        if scale is None:
            codes, scale = codes[..., :-4], scale_of(codes[..., -4:])
        if isinstance(self.element, Float):
            return (numbers(codes, self.element.format) * scale).to(dtype)
        codes = codes - 256.0 * at_least(codes, 128.0)
        return ((codes if self.zero is None else codes - self.zero) * scale).to(dtype)


def scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    """float32 [..., 1] of 2^-126 at least -> its four bytes, the lowest first, as float32 [..., 4]."""
    one = scale.new_full((), 1.0)
    finite = one * torch.finfo(torch.float32).max >= scale
    known = torch.where(finite, scale, one)
    power = exponent(known)
    fraction = (known * power_of_two(0.0 - power) - 1.0) * 2.0**23
    fraction = torch.where(finite, fraction, torch.where(scale == scale, one * 0.0, one * 2.0**22))
    biased = torch.where(finite, power + 127.0, one * 255.0)
    middle, high, half = (torch.floor(part) for part in (fraction * 2.0**-8, fraction * 2.0**-16, biased * 0.5))
    odd = biased - 2.0 * half
    return torch.cat([fraction - 256.0 * middle, middle - 256.0 * high, high + 128.0 * odd, half], -1)


def scale_of(parts: torch.Tensor) -> torch.Tensor:
    """What the four bytes [..., 4] of `scale_bytes` stand for: float32 [..., 1]."""
    low, middle, high, half = (parts[..., place : place + 1] for place in range(4))
    one, odd = parts.new_full((), 1.0), at_least(high, 128.0)
    fraction, power = (high - 128.0 * odd) * 65536.0 + middle * 256.0 + low, 2.0 * half + odd - 127.0
    found = power_of_two(power.clamp(max=127.0)) * (1.0 + fraction * 2.0**-23)
    none = torch.where(fraction >= one, one * float("nan"), one * float("inf"))
    return torch.where(power >= one * 128.0, none, found)


def _float_bytes(scaled: torch.Tensor, name: str) -> torch.Tensor:
    """float32 -> bytes, as float32; saturates. In its octave a byte is a whole number of steps, and octaves follow one another."""
    magnitudes = scaled.abs().clamp(max=_LARGEST[name])
    count, inverse = octaves(magnitudes, name)
    size = half_to_even(magnitudes * inverse) + count * _STEPS[name]
    size = torch.where(scaled == scaled, size, size.new_full((), 127.0))
    return size + 128.0 * (1.0 - at_least(scaled, 0.0))
