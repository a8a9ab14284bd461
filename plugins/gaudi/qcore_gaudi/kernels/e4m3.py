"""e4m3 within what every Gaudi has. Gaudi2's numbers end at 240: the bytes that stand for 256 to 448 in torch's e4m3fn, 0x78 to 0x7e, are no numbers there.
Half of such a number is one; nothing else needs to change, so that all here is right on Gaudi3, too, which has them all.

A number of e4m3 can be halved unless it is below 2^-5, where the step is 2^-9 already. What is halved here shares its scale with a number above 240, beside
which that step is nothing.
"""

from __future__ import annotations

import torch

from qcore.kernels.divide import divide

LARGEST = 240.0
"""Of Gaudi2."""
_ALL = 448.0
"""Of e4m3fn, which schemes mean."""
_ROWS = 256
"""Rows brought into range at a time."""


def halved_rows(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's e4m3 codes [N, K] and scales float32 [N], both on the CPU: rows with a code above 240 are halved and their scales doubled."""
    kept, scales = halved_groups(codes, scales.unsqueeze(1), codes.shape[1])
    return kept, scales.squeeze(1)


def halved_groups(codes: torch.Tensor, scales: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same under scales [N, ceil(K / size)], group by group."""
    kept, factors, columns = [], [], codes.shape[1]
    for part in codes.split(_ROWS):
        wide = torch.nn.functional.pad(part.to(torch.float32), (0, -columns % size)).unflatten(1, (-1, size))
        above = (wide.abs() > LARGEST).any(2, keepdim=True)
        kept.append(torch.where(above, wide / 2, wide).flatten(1)[:, :columns].to(torch.float8_e4m3fn))
        factors.append(1.0 + above.squeeze(2))
    return torch.cat(kept), scales * torch.cat(factors)


def rounded(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of each row, and their scales: float8_e4m3fn [M, K] up to 240, and float32 [M, 1]. x: [M, K]. scale: float32 [1] or [M, 1]; None is
    absmax / 448 of each row. Rows with a code above 240 are halved and their scales doubled.

    Inputs are divided here and cast without a scale: the operator multiplies by the inverse, in x's type, and bfloat16 beside its absmax / 448 often lies
    halfway between two codes.
    """
    values = x.to(torch.float32)
    if scale is None:
        scale = divide(values.abs().amax(-1, keepdim=True), _ALL)
        scale = torch.where(scale == 0, 1.0, scale)
    scaled = (values / scale).clamp(-_ALL, _ALL)
    factor = torch.where(scaled.abs().amax(-1, keepdim=True) > LARGEST, 2.0, 1.0)
    return cast(scaled / factor), scale * factor


def to_bytes(scaled: torch.Tensor) -> torch.Tensor:
    """float32 -> the bytes of e4m3fn, uint8; saturates. Of a number above 240 the half is cast, and the exponent raised by one, which is 8 in the byte."""
    scaled = scaled.clamp(-_ALL, _ALL)
    above = scaled.abs() > LARGEST
    codes = cast(torch.where(above, scaled / 2, scaled)).view(torch.uint8).to(torch.int32)
    return torch.where(above, codes + 8, codes).to(torch.uint8)


def from_bytes(rows: torch.Tensor) -> torch.Tensor:
    """The reverse: float32."""
    wide = rows.to(torch.int32)
    size = wide & 0x7F
    above = (size > 0x77) & (size < 0x7F)
    codes = torch.where(above, wide & ~8, wide).to(torch.uint8).view(torch.float8_e4m3fn)
    return from_codes(codes, torch.float32) * torch.where(above, 2.0, 1.0)


def cast(values: torch.Tensor) -> torch.Tensor:
    """float32 up to 240 -> float8_e4m3fn, half to even."""
    codes: torch.Tensor = torch.ops.hpu.cast_to_fp8_v2(values, None, False, False, torch.float8_e4m3fn)[0]
    return codes


def from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8_e4m3fn up to 240 -> dtype, without a scale."""
    values: torch.Tensor = torch.ops.hpu.cast_from_fp8(codes, None, dtype)
    return values
