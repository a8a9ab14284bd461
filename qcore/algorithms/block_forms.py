"""ggml's block types in which each weight has a level of its own, scale * level - minimum: what levels, scales and minima may be, and how they are packed.

Layouts: those that qcore/blocks (simple, kquants, lookup, ternary) takes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from qcore.blocks.lookup import IQ4
from qcore.blocks.pack import LARGEST, half, neighbours, planes
from qcore.blocks.quantize_affine import fit_affine, fit_affine_runs
from qcore.blocks.quantize_fit import ONE, Steps, Table, Uniform, fit
from qcore.blocks.quantize_simple import pack_4, pack_5, pack_8


@dataclass(frozen=True)
class Scales:
    """Of B blocks: level l of run r stands for d * scales[r] * l - dmin * minima[r].

    d, dmin: float32 [B, 1], numbers that float16 holds. scales, minima: float32 [B, runs], whole numbers; minima are zero where the type has none.
    """

    d: torch.Tensor
    dmin: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor


Pack = Callable[[torch.Tensor, Scales], torch.Tensor]
"""From levels, float32 [B, elements], and scales to blocks, uint8 [B, bytes]."""


@dataclass(frozen=True)
class Form:
    """One type. book: the levels. runs: parts of a block that have a scale each. scales: the multipliers of d that these may be. minima: those of dmin, or None."""

    book: Uniform | Table
    pack: Pack
    runs: int = 1
    scales: Steps = ONE
    minima: Steps | None = None

    @property
    def signed(self) -> bool:
        """Whether d and dmin may be negative, as they are not beside minima under a scale of their own."""
        return self.minima is None or self.minima.count == 1

    def fitted(self, values: torch.Tensor, importance: torch.Tensor) -> Scales:
        """Scales of least squared error for values [B, elements], of which columns count by importance [elements]."""
        unit = values.abs().amax(1, keepdim=True)
        unit.masked_fill_(unit == 0, 1)
        x = (values / unit).view(len(values), self.runs, -1)
        w = importance.view(1, self.runs, -1).expand_as(x)
        dmin, minima = torch.zeros_like(unit), x.new_zeros(x.shape[:2])
        if self.minima is None:
            d, codes, _ = fit(x, w, unit, self.book, self.scales)
            scales = self.scales.multipliers(codes)
        elif self.minima.count > 1:
            d, dmin, scales, minima, _ = fit_affine_runs(x, w, unit, self._high, self.scales)
        else:
            scale, least = fit_affine(x, w, self._high, most=torch.inf)
            d, dmin = scale.squeeze(1) * unit, -least.squeeze(1) * unit
            scales = minima = torch.ones_like(unit)
        return Scales(as_half(d), as_half(dmin), scales, minima)

    @property
    def _high(self) -> int:
        assert isinstance(self.book, Uniform)
        return self.book.high


def as_half(values: torch.Tensor) -> torch.Tensor:
    """float32, the nearest numbers that float16 holds; what is too large becomes the largest."""
    return values.clamp(-LARGEST, LARGEST).half().float()


def _around(*targets: float, width: float, count: int = 8) -> list[float]:
    """Where a search begins: with the largest magnitude at places on both sides of each target."""
    return [target + width * i / count for target in targets for i in range(-count, count + 1)]


# --- Packing ---


def _codes(pack: Callable[..., torch.Tensor], first: int) -> Pack:
    """Of types with one scale and no minimum: codes count levels from `first` on."""
    return lambda levels, scales: pack(levels - first, scales.d)


def _with_minimum(pack: Callable[..., torch.Tensor]) -> Pack:
    """The stored minimum is added, not subtracted."""
    return lambda levels, scales: pack(levels, scales.d, -scales.dmin)


def _iq4_nl(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    return pack_4(_IQ4.codes(levels), scales.d)


def _q2_0(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    return torch.cat([half(scales.d), neighbours(levels + 1, 2)], 1)


def _tq2_0(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    return torch.cat([planes((levels + 1).view(-1, 2, 4, 32), 2).flatten(1), half(scales.d)], 1)


def _q2_k(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    runs = scales.scales.to(torch.uint8) | scales.minima.to(torch.uint8) << 4
    return torch.cat([runs, planes(levels.view(-1, 2, 4, 32), 2).flatten(1), half(scales.d), half(scales.dmin)], 1)


def _q3_k(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    codes, runs = (levels + 4).to(torch.uint8), (scales.scales + 32).to(torch.uint8)
    third, low = planes((codes >> 2).view(-1, 8, 32), 1), planes((codes & 3).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([third, low, planes((runs & 15).view(-1, 2, 8), 4), planes((runs >> 4).view(-1, 4, 4), 2), half(scales.d)], 1)  # fmt: skip


def _q4_k(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    return torch.cat([half(scales.d), half(scales.dmin), _six_bits(scales), planes(levels.view(-1, 4, 2, 32), 4).flatten(1)], 1)  # fmt: skip


def _q5_k(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    codes = levels.to(torch.uint8)
    fifth, low = planes((codes >> 4).view(-1, 8, 32), 1), planes((codes & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([half(scales.d), half(scales.dmin), _six_bits(scales), fifth, low], 1)


def _q6_k(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    codes = (levels + 32).to(torch.uint8)
    low, high = planes((codes & 15).view(-1, 2, 2, 64), 4).flatten(1), planes((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)  # fmt: skip
    return torch.cat([low, high, scales.scales.to(torch.int8).view(torch.uint8), half(scales.d)], 1)


def _iq4_xs(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    runs, codes = (scales.scales + 32).to(torch.uint8), _IQ4.codes(levels)
    return torch.cat([half(scales.d), neighbours(runs >> 4, 2), neighbours(runs & 15, 4), planes(codes.view(-1, 8, 2, 16), 4).flatten(1)], 1)  # fmt: skip


def _six_bits(scales: Scales) -> torch.Tensor:
    """Eight scales and eight minima in 12 bytes: the two high bits of the last four of either lie above the first four."""
    (scale, more), (minimum, others) = (part.to(torch.uint8).view(-1, 2, 4).unbind(1) for part in (scales.scales, scales.minima))  # fmt: skip
    return torch.cat([scale | more >> 4 << 6, minimum | others >> 4 << 6, more & 15 | (others & 15) << 4], 1)


_IQ4 = Table(IQ4, _around(-127, 113, width=36.0))

FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "q4_0": Form(Uniform(-8, 7, _around(-8, 7, width=1.5)), _codes(pack_4, -8)),
        "q4_1": Form(Uniform(0, 15, ()), _with_minimum(pack_4), minima=ONE),
        "q5_0": Form(Uniform(-16, 15, _around(-16, 15, width=1.5)), _codes(pack_5, -16)),
        "q5_1": Form(Uniform(0, 31, ()), _with_minimum(pack_5), minima=ONE),
        "q8_0": Form(Uniform(-127, 127, _around(127, width=1.0)), _codes(pack_8, 0)),
        "q2_0": Form(Uniform(-1, 2, [0.2 * i for i in range(-12, 20)]), _q2_0),
        "tq2_0": Form(Uniform(-1, 1, [0.6 + 0.1 * i for i in range(20)]), _tq2_0),
        "q2_k": Form(Uniform(0, 3, ()), _q2_k, 16, Steps(0, 1, 16), Steps(0, 1, 16)),
        "q3_k": Form(Uniform(-4, 3, _around(-4, 3, width=0.9)), _q3_k, 16, Steps(-32, 1, 64)),
        "q4_k": Form(Uniform(0, 15, ()), _q4_k, 8, Steps(0, 1, 64), Steps(0, 1, 64)),
        "q5_k": Form(Uniform(0, 31, ()), _q5_k, 8, Steps(0, 1, 64), Steps(0, 1, 64)),
        "q6_k": Form(Uniform(-32, 31, _around(-32, 31, width=1.5)), _q6_k, 16, Steps(-128, 1, 256)),
        "iq4_nl": Form(_IQ4, _iq4_nl),
        "iq4_xs": Form(_IQ4, _iq4_xs, 8, Steps(-32, 1, 64)),
    }
)
"""By the type's name. Those that are missing have levels that several weights share, or scales that are no multiples."""
