"""ggml's blocks, taken apart once and held in as few bits: codes in planes, the integer scales of runs, and the scale of each block. The weight is put together in
float32 at every call, by the operations of its definition (qcore.blocks): codes * scale - minimum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from qcore.blocks.dequantize import block_parts
from qcore.blocks.grids import grid, shifted_grid
from qcore.blocks.lookup import FP4_DOUBLED, IQ4
from qcore.blocks.types import BLOCK_TYPES
from qcore.blocks.unpack import field, half
from qcore.elements import Block
from qcore_neuron.kernels.codebooks import choose
from qcore_neuron.kernels.planes import from_planes, planes_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.blocks.unpack import Parts
    from qcore.tensor import LayerTensors

_ROWS = 256
"""Rows taken apart at a time."""


@dataclass(frozen=True)
class Form:
    """How a type is held. bits: of one stored code. A code stands for code * step + offset; or, where there is a table, for an entry of it: a number, or a tuple of
    `width` numbers whose signs are stored beside it (`iq1` has them in the table). d, dmin: bytes of a block where the float16 is that all its scales, and minima, are
    whole multiples of, times `unit`; None: the scales of runs are floats of their own."""

    bits: int
    offset: int = 0
    step: int = 1
    table: str = ""
    width: int = 1
    d: int | None = None
    dmin: int | None = None
    unit: float = 1.0


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "q4_0": Form(4, -8), "q4_1": Form(4), "q5_0": Form(5, -16), "q5_1": Form(5), "q8_0": Form(8, -128),
        "q1_0": Form(1, -1, step=2), "q2_0": Form(2, -1), "tq1_0": Form(2, -1), "tq2_0": Form(2, -1),
        "q2_k": Form(2, d=80, dmin=82), "q3_k": Form(3, -4, d=108), "q4_k": Form(4, d=0, dmin=2), "q5_k": Form(5, d=0, dmin=2), "q6_k": Form(6, -32, d=208),
        "iq4_nl": Form(4, table="iq4"), "iq4_xs": Form(4, table="iq4", d=0), "mxfp4": Form(4, table="fp4"), "nvfp4": Form(4, table="fp4"),
        "iq1_s": Form(12, table="iq1", width=8, d=0, unit=0.125), "iq1_m": Form(12, table="iq1", width=8, d=48, unit=0.125),
        "iq2_xxs": Form(8, table="iq2_xxs", width=8, d=0, unit=0.125), "iq2_xs": Form(9, table="iq2_xs", width=8, d=0, unit=0.125),
        "iq2_s": Form(10, table="iq2_s", width=8, d=0, unit=0.125),
        "iq3_xxs": Form(8, table="iq3_xxs", width=4, d=0, unit=0.25), "iq3_s": Form(9, table="iq3_s", width=4, d=0),
    }
)  # fmt: skip


class BlockLinear(torch.nn.Module):
    """codes: planes, uint8 [N, K / width * bits / 8]. signs: planes of one bit [N, K / 8]. fine, least: whole multiples of coarse and coarse_least, int8 [N, runs]. coarse,
    coarse_least: float32 [N, blocks], or [N, runs] where nothing is finer. table: float32 [16], or int8 [entries, width]."""

    codes: torch.Tensor
    signs: torch.Tensor | None
    fine: torch.Tensor | None
    coarse: torch.Tensor
    least: torch.Tensor | None
    coarse_least: torch.Tensor | None
    table: torch.Tensor | None

    def __init__(self, kind: str, dtype: torch.dtype, parts: Mapping[str, torch.Tensor | None]) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        for name in ("codes", "signs", "fine", "coarse", "least", "coarse_least"):
            self.register_buffer(name, parts.get(name))
        self.register_buffer("table", _table(FORMS[kind]))

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        element = weight.scheme.weight.element
        assert isinstance(element, Block)
        parts = [_taken_apart(element.type, part) for part in weight.codes.split(_ROWS)]
        return cls(element.type, dtype, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight(dict(self.named_buffers())).to(x.dtype).t())

    def weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 [rows, K] of some rows' parts."""
        scales = _multiplied(parts.get("fine"), parts["coarse"])
        grouped: torch.Tensor = self._values(parts).unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
        if "coarse_least" in parts:
            grouped = grouped - _multiplied(parts.get("least"), parts["coarse_least"]).unsqueeze(-1)
        return grouped.flatten(1)

    def _values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        form, codes = FORMS[self.kind], from_planes(parts["codes"], FORMS[self.kind].bits)
        if self.table is None:
            return codes * float(form.step) + float(form.offset)
        if form.width == 1:
            return choose(codes, self.table)
        tuples = self.table.index_select(0, codes.reshape(-1).to(torch.int32)).to(torch.float32)
        values = tuples.reshape(codes.shape[0], codes.shape[1] * form.width)
        return values if "signs" not in parts else values * (1.0 - 2.0 * from_planes(parts["signs"], 1))


class BlockEmbedding(BlockLinear):
    """Only the rows that are looked up are put together."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        flat = tokens.to(torch.int32).reshape(-1)
        rows = {name: part.index_select(0, flat) for name, part in self.named_buffers() if name != "table"}
        weight = self.weight(rows).to(self.dtype)
        return weight.reshape(*tokens.shape, weight.shape[1])


def _multiplied(fine: torch.Tensor | None, coarse: torch.Tensor) -> torch.Tensor:
    if fine is None:
        return coarse
    spread: torch.Tensor = fine.to(torch.float32).unflatten(1, (coarse.shape[1], -1)) * coarse.unsqueeze(-1)
    return spread.flatten(1)


def _table(form: Form) -> torch.Tensor | None:
    cpu = torch.device("cpu")
    if form.width == 1:
        numbers = {"iq4": IQ4, "fp4": FP4_DOUBLED}.get(form.table)
        return None if numbers is None else torch.tensor(numbers, dtype=torch.float32)
    return (shifted_grid(cpu) if form.table == "iq1" else grid(form.table, cpu)).view(torch.int8).view(-1, form.width)


def _taken_apart(kind: str, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of rows of blocks, uint8 [rows, bytes]."""
    form, found, rows = FORMS[kind], block_parts(kind, codes), len(codes)
    values = found.codes.reshape(rows, -1).to(torch.int32)
    parts = _coded(form, values)
    blocks = codes.reshape(-1, BLOCK_TYPES[kind].nbytes)
    parts |= _scales(form, blocks, found, rows)
    return {name: part.contiguous() for name, part in parts.items()}


def _coded(form: Form, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Planes of the codes that whole numbers [rows, K] have in the form."""
    table = _table(form)
    if table is None:
        return {"codes": planes_of((values - form.offset) // form.step, form.bits)}
    if form.width == 1:
        return {"codes": planes_of((values.unsqueeze(-1) == table).to(torch.uint8).argmax(-1), form.bits)}
    signed = form.table == "iq1"
    tuples = (values if signed else values.abs()).to(torch.int8).view(len(values), -1, form.width)
    word = torch.int64 if form.width == 8 else torch.int32
    known, order = table.contiguous().view(word).flatten().sort()
    codes = order[torch.searchsorted(known, tuples.contiguous().view(word).squeeze(-1))]
    parts = {"codes": planes_of(codes, form.bits)}
    return parts if signed else parts | {"signs": planes_of((values < 0).to(torch.uint8), 1)}


def _scales(form: Form, blocks: torch.Tensor, found: Parts, rows: int) -> dict[str, torch.Tensor]:
    parts = {}
    pairs = (("fine", "coarse", found.scale, form.d), ("least", "coarse_least", found.minimum, form.dmin))
    for fine, coarse, stored, place in pairs:
        if stored is None:
            continue
        if place is None:
            parts[coarse] = stored.reshape(rows, -1)
            continue
        unit = (_digits(blocks) if place == 48 else half(blocks, place)) * form.unit
        parts[coarse] = unit.reshape(rows, -1)
        parts[fine] = torch.where(unit == 0, 0, stored / unit).round().to(torch.int8).reshape(rows, -1)
    return parts


def _digits(blocks: torch.Tensor) -> torch.Tensor:
    """iq1_m's float16, float32 [B, 1], whose four hexadecimal digits lie on top of the words at byte 48."""
    words = field(blocks, torch.int16, 48, 4).int()
    digits = torch.stack([(word >> 12 & 15) << 4 * place for place, word in enumerate(words.unbind(1))], 1)
    return digits.sum(1, keepdim=True).to(torch.int16).view(torch.float16).float()
