"""Rounding inputs and states by operators that Neuron's compiler is known to take: floor and ceil, arithmetic, and comparisons of tensors.

HLO's round-nearest-even is in none of AWS's lists, and torch-xla compares with a plain number in float64, which no chip has. Nothing here views bytes as
another type, which torch-xla leaves to the CPU.
"""

from __future__ import annotations

import torch

from qcore.kernels.divide import divide
from qcore.kernels.minifloat import LARGEST

_EPS = torch.finfo(torch.float32).eps
"""The scale of a row of zeros, which any would do for: compressed-tensors'."""

_FINE_BITS = {"e2m1": 1, "e4m3fn": 3, "e5m2": 2}
_OCTAVES = {"e2m1": (1, 2), "e4m3fn": (-5, 8), "e5m2": (-13, 15)}
"""Exponents of a format's second octave of normal numbers and of its last. Below the second, the step is that of the numbers that are not normal."""


def half_to_even(values: torch.Tensor) -> torch.Tensor:
    """The nearest whole numbers, float32; of two that are as near, the even one. As long as floor gives them, all of it is exact but for values of
    less than a half, which give zero all the same."""
    low = torch.floor(values)
    above = values - low - 0.5  # halfway: 0
    odd = low - 2.0 * torch.floor(low * 0.5)
    return low + torch.ceil(above) + (1.0 - torch.ceil(above.abs())) * odd


def at_least(values: torch.Tensor, bound: float) -> torch.Tensor:
    """1 where values reach the bound, else 0, in their type."""
    return (values >= values.new_full((), bound)).to(values.dtype)


def octaves(magnitudes: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """For float32 magnitudes, how many of a format's octaves lie below (0 in the first, which has the step of the numbers that are not normal), and the inverse
    of the step between its numbers there: both exact."""
    first, last = _OCTAVES[name]
    inverse = torch.full_like(magnitudes, 2.0 ** (_FINE_BITS[name] + 1 - first))
    count = torch.zeros_like(magnitudes)
    for exponent in range(first, last + 1):
        reached = at_least(magnitudes, 2.0**exponent)
        inverse = inverse * (1.0 - 0.5 * reached)
        count = count + reached
    return count, inverse


def on_grid(values: torch.Tensor, name: str) -> torch.Tensor:
    """float32 values rounded to the nearest number of a small float format, half to even; beyond its largest they saturate."""
    values = values.clamp(-LARGEST[name], LARGEST[name])
    _, inverse = octaves(values.abs(), name)
    return half_to_even(values * inverse) / inverse


def symmetric_scale(magnitudes: torch.Tensor, steps: float) -> torch.Tensor:
    """magnitudes / steps, and a scale for zeros."""
    scale = divide(magnitudes, steps)
    return scale + (1.0 - torch.sign(scale)) * _EPS


def int8_codes(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of each row, as float32, and their scales: [..., K] and [..., 1]; under a stored scale [1], which is given back, or absmax / 127.5."""
    values = x.to(torch.float32)
    if scale is None:
        scale = symmetric_scale(values.abs().amax(-1, keepdim=True), 127.5)
    return half_to_even((values / scale).clamp(-128.0, 127.0)), scale


def fp8_codes(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3's numbers for each row, as float32, and their scales: [..., K] and [..., 1]; under a stored scale [1], which is given back, or absmax / 448.

    By arithmetic: most chips have none above 240, and compilers round on their way to 8 bits twice (XLA's for CPUs does, by float16)."""
    values = x.to(torch.float32)
    if scale is None:
        scale = symmetric_scale(values.abs().amax(-1, keepdim=True), LARGEST["e4m3fn"])
    return on_grid(values / scale, "e4m3fn"), scale


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^e, exactly, of whole float32 exponents from -126 to 127."""
    rest = exponents + 126.0
    found = torch.full_like(rest, 2.0**-126)
    for power in (64, 64, 64, 32, 16, 8, 4, 2, 1):  # 2^128 is no float32
        bit = at_least(rest, power)
        rest = rest - bit * power
        found = found * (1.0 + bit * (2.0**power - 1.0))
    return found


def exponent(magnitudes: torch.Tensor) -> torch.Tensor:
    """floor(log2(m)) of positive float32 numbers, exactly, from -126 up: what the logarithm gives, set right by comparison."""
    guess = torch.floor(torch.log(magnitudes) * 1.4426950408889634).clamp(-126.0, 127.0)
    low = power_of_two(guess)
    below = 1.0 - (magnitudes >= low).to(torch.float32)
    above = (magnitudes * 0.5 >= low).to(torch.float32)
    return guess + above - below
