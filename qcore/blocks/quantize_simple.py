"""Encoders of the types with one scale per block: the inverse of `simple` and `ternary`.

`REFERENCE` holds ggml's own formulas (src/ggml-quants.c, quantize_row_*_ref), which every tool agrees on bit for bit:
uint8 [B, bytes] from float32 [B, elements]. `SEARCH` holds what minimizes a weighted error instead, as in
`quantize_fit`: uint8 [B, bytes] from x, w [B, elements] and unit [B, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.blocks.pack import half, neighbours, planes
from qcore.blocks.quantize_affine import fit_affine
from qcore.blocks.quantize_fit import Book, Table, Uniform, fit, inverse_of, representable

_TERNARY = Uniform(-1, 1, (0.6 + 0.1 * i for i in range(20)))


def _around(*targets: int, width: float, count: int = 8) -> list[float]:
    """Starts on both sides of each target."""
    return [target + width * i / count for target in targets for i in range(-count, count + 1)]


# --- Packing: float32 scales (and minima) [B, 1] and codes [B, elements] into blocks ---


def pack_4(codes: Tensor, *halves: Tensor) -> Tensor:
    return torch.cat([*map(half, halves), planes(codes.view(-1, 2, 16), 4)], 1)


def pack_5(codes: Tensor, *halves: Tensor) -> Tensor:
    codes = codes.to(torch.uint8)
    fifth = neighbours(codes >> 4, 1)
    return torch.cat([*map(half, halves), fifth, planes((codes & 15).view(-1, 2, 16), 4)], 1)


def pack_8(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([half(d), codes.to(torch.int8).view(torch.uint8)], 1)


def _pack_neighbours(bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda codes, d: torch.cat([half(d), neighbours(codes, bits)], 1)


def _pack_tq1_0(codes: Tensor, d: Tensor) -> Tensor:
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=codes.device).view(-1, 1)
    digits = codes.int()
    parts = digits[:, :160].view(-1, 5, 32), digits[:, 160:240].view(-1, 5, 16), digits[:, 240:].view(-1, 4, 4)
    numbers = torch.cat([(part * powers[: part.shape[1]]).sum(1) for part in parts], 1)
    # A number below 3^5 = 243 as a fraction of 256, rounded up: so the decoder needs no division.
    return torch.cat([((numbers * 256 + 242) // 243).to(torch.uint8), half(d)], 1)


def _pack_tq2_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([planes(codes.view(-1, 2, 4, 32), 2).flatten(1), half(d)], 1)


# --- ggml's formulas ---


def _symmetric(pack: Callable[..., Tensor], low: int) -> Callable[[Tensor], Tensor]:
    """q4_0, q5_0: the value of the largest magnitude becomes exactly `low`."""

    def encode(x: Tensor) -> Tensor:
        d = x.gather(1, x.abs().argmax(1, keepdim=True)) / low
        return pack((x * inverse_of(d) + (0.5 - low)).trunc().clamp_(0, -2 * low - 1), d)

    return encode


def _affine(pack: Callable[..., Tensor], high: int) -> Callable[[Tensor], Tensor]:
    """q4_1, q5_1: from the smallest value to the largest."""

    def encode(x: Tensor) -> Tensor:
        least, most = x.aminmax(dim=1, keepdim=True)
        d = (most - least) / high
        return pack(((x - least) * inverse_of(d) + 0.5).trunc().clamp_(0, high), d, least)

    return encode


def _by_largest(pack: Callable[..., Tensor], high: int, offset: int) -> Callable[[Tensor], Tensor]:
    """q8_0, tq1_0, tq2_0: the largest magnitude becomes +-high. Halves are rounded away from zero."""

    def encode(x: Tensor) -> Tensor:
        d = x.abs().amax(1, keepdim=True) / high
        scaled = x * inverse_of(d)
        whole = scaled.trunc()
        rounded = whole + (2 * (scaled - whole)).trunc_()  # adding 1/2 to the number just below would make it 1
        return pack(rounded.clamp_(-high, high) + offset, d)

    return encode


REFERENCE: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "q4_0": _symmetric(pack_4, -8),
        "q4_1": _affine(pack_4, 15),
        "q5_0": _symmetric(pack_5, -16),
        "q5_1": _affine(pack_5, 31),
        "q8_0": _by_largest(pack_8, 127, 0),
        "tq1_0": _by_largest(_pack_tq1_0, 1, 1),
        "tq2_0": _by_largest(_pack_tq2_0, 1, 1),
    }
)

# --- The least weighted error ---


def _fitted(
    pack: Callable[..., Tensor], book: Book, to_codes: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def encode(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
        found = fit(x.unsqueeze(1), w.unsqueeze(1), unit, book)
        return pack(to_codes(found.levels.squeeze(1)), found.d)

    return encode


def _fitted_affine(pack: Callable[..., Tensor], high: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def encode(x: Tensor, w: Tensor, unit: Tensor) -> Tensor:
        scale, least = fit_affine(x, w, high, most=torch.inf)
        scale, least = representable(scale, unit), representable(least, unit)
        codes = ((x - least) * inverse_of(scale)).round_().clamp_(0, high)
        return pack(codes, scale * unit, least * unit)

    return encode


SEARCH: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "q4_0": _fitted(pack_4, Uniform(-8, 7, _around(-8, 7, width=1.5)), lambda levels: levels + 8),
        "q4_1": _fitted_affine(pack_4, 15),
        "q5_0": _fitted(pack_5, Uniform(-16, 15, _around(-16, 15, width=1.5)), lambda levels: levels + 16),
        "q5_1": _fitted_affine(pack_5, 31),
        # -128 is left out: kernels negate codes.
        "q8_0": _fitted(pack_8, Uniform(-127, 127, _around(127, width=1.0)), lambda levels: levels),
        "q1_0": _fitted(_pack_neighbours(1), Table((-1, 1), (1.0,)), lambda levels: levels > 0),
        "q2_0": _fitted(
            _pack_neighbours(2), Uniform(-1, 2, [0.2 * i for i in range(-12, 20)]), lambda levels: levels + 1
        ),
        "tq1_0": _fitted(_pack_tq1_0, _TERNARY, lambda levels: levels + 1),
        "tq2_0": _fitted(_pack_tq2_0, _TERNARY, lambda levels: levels + 1),
    }
)
