"""The kv cache in 8 bits. Codes are made and read as numbers: torch-xla leaves views of bytes as another type to the CPU, and e4m3's numbers above 240 are none on most
chips. Bytes are those that the codes have everywhere."""

from __future__ import annotations

import torch

from qcore.elements import Float
from qcore.kernels.kv_cache import KvRounding
from qcore_neuron.kernels.floats import numbers
from qcore_neuron.kernels.rounding import at_least, half_to_even, octaves

_LARGEST = {"e4m3fn": 448.0, "e5m2": 57344.0}
_STEPS = {"e4m3fn": 8.0, "e5m2": 4.0}
"""Numbers in an octave."""


class KvCache(KvRounding):
    """What KvRounding does, to the byte but for negative zeros, under scales that are stored. Scales of run time are bytes of floats in a row, which only a view
    reads: with them it is KvRounding."""

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return super().encode(states)
        self._follow(states.device)
        wide = states.to(torch.float32)
        scaled = wide / self.scale if self.inverse is None else wide * self.inverse
        if isinstance(self.element, Float):
            return _float_bytes(scaled, self.element.format)
        whole = half_to_even(scaled.clamp(-1024.0, 1024.0))  # beyond which zero points change nothing
        codes = (whole if self.zero is None else whole + self.zero).clamp(-128.0, 127.0)
        return (codes + 256.0 * (1.0 - at_least(codes, 0.0))).to(torch.uint8)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.scale is None:
            return super().decode(rows, dtype)
        self._follow(rows.device)
        codes = rows.to(torch.float32)
        if isinstance(self.element, Float):
            return (numbers(codes, self.element.format) * self.scale).to(dtype)
        codes = codes - 256.0 * at_least(codes, 128.0)
        return ((codes if self.zero is None else codes - self.zero) * self.scale).to(dtype)


def _float_bytes(scaled: torch.Tensor, name: str) -> torch.Tensor:
    """float32 -> uint8; saturates. In its octave a byte is a whole number of steps, and octaves follow one another."""
    magnitudes = scaled.abs().clamp(max=_LARGEST[name])
    count, inverse = octaves(magnitudes, name)
    size = half_to_even(magnitudes * inverse) + count * _STEPS[name]
    size = torch.where(scaled == scaled, size, size.new_full((), 127.0))
    return (size + 128.0 * (1.0 - at_least(scaled, 0.0))).to(torch.uint8)
