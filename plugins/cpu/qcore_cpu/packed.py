"""Packed weights: the canonical layout rearranged, once, into the one that the native kernels stream (native/packed.h)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.refusal import Refusal, Refused
from qcore_cpu.library import register

if TYPE_CHECKING:
    from collections.abc import Iterable


_PANEL, CHUNK, _LINE = 16, 32, 64
_MAGIC, _VERSION = 0x55504345524F4351, 1

TABLE3, TABLE4 = 19, 20
"""Header.code of codebooks of 3 and 4 bits."""
FLOATS = {"e4m3fn": 32, "e4m3": 32, "e4m3fnuz": 33, "e5m2": 34, "e3m2": 40, "e2m3": 41}
"""Header.code of small floats."""
FLOAT_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
E8M0, E4M3, RUNS, NIBBLES, TABLE8 = 3, 4, 5, 6, 7
ZERO_U8, ZERO_S8, FLOAT_OFFSET, RUN_OFFSETS, NIBBLE_OFFSETS = 1, 2, 3, 4, 5
EXACT, BLOCKS, TOKEN, STATIC = 0, 1, 2, 3


class Header(ctypes.Structure):
    """native/packed.h's `Header`, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "magic", "version", "rows", "columns", "padded", "code", "zero", "group", "groups", "scale", "offset",
            "input", "codes", "scales", "offsets", "super_scales", "super_offsets", "order", "table", "total",
        )),
        *((name, ctypes.c_double) for name in ("tensor_scale", "shift", "input_scale")),
        ("coarse_group", ctypes.c_int64),
        ("reserved", ctypes.c_int64 * 8),
    ]  # fmt: skip


@dataclass
class Source:
    """Codes, a block of rows after the other: uint8 [rows, bytes], a bit stream of `bits` bits, or ggml's blocks of type -`bits`.
    Every block but the last has a multiple of 16 rows. flip: what is added to each code, in 8 bits."""

    blocks: Iterable[torch.Tensor]
    bits: int
    flip: int = 0


@dataclass
class Parts:
    """A weight in the kernels' words, before it is laid out.

    scales, offsets: [N, groups] in the dtype that is stored; super_scales, super_offsets: [N, ...] above them. grid: blocks that
    are kept as they are, instead of codes and scales.
    """

    header: Header
    codes: Source
    scales: torch.Tensor | None
    offsets: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_offsets: torch.Tensor | None = None
    order: torch.Tensor | None = None
    table: torch.Tensor | None = None
    grid: torch.Tensor | None = None


def header_of(packed: torch.Tensor) -> Header:
    """A copy of the header of what `lay_out` made."""
    return Header.from_buffer_copy(packed[: ctypes.sizeof(Header)].numpy().tobytes())


def lay_out(parts: Parts) -> torch.Tensor:
    """The header and its sections in one block of bytes, each section at a line of the cache."""
    header, library = parts.header, register()
    header.magic, header.version = _MAGIC, _VERSION
    header.padded = -(-header.columns // CHUNK) * CHUNK
    header.group = min(header.group, header.padded)
    header.groups = -(-header.padded // header.group)
    panels = -(-header.rows // _PANEL)
    codes_bytes = (
        parts.grid.numel() if parts.grid is not None else panels * header.padded * _PANEL * code_bits(header.code) // 8
    )
    sections = {
        "scales": None if parts.scales is None else _by_panel(parts.scales, header.groups),
        "offsets": None if parts.offsets is None else _by_panel(parts.offsets, header.groups),
        "super_scales": None if parts.super_scales is None else _by_panel(parts.super_scales),
        "super_offsets": None if parts.super_offsets is None else _by_panel(parts.super_offsets),
        "order": None if parts.order is None else parts.order.to(torch.int32),
        "table": parts.table,
    }
    place = ctypes.sizeof(Header)
    header.codes = place
    place = _line(place + codes_bytes)
    for name, section in sections.items():
        if section is not None:
            setattr(header, name, place)
            place = _line(place + section.numel() * section.element_size())
    header.total = place
    out = torch.empty(place, dtype=torch.uint8)
    library.qcore_huge_pages(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(place))
    out[: header.codes] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    order = None if sections["order"] is None else sections["order"].contiguous()
    end = header.codes + codes_bytes
    if parts.grid is not None:
        out[header.codes : end] = parts.grid.flatten()
    else:
        _pack_codes(library, out, parts.codes, header.rows, order)
    for name, section in sections.items():
        if section is not None:
            start = getattr(header, name)
            out[end:start] = 0
            end = start + section.numel() * section.element_size()
            out[start:end] = section.contiguous().view(-1).view(torch.uint8)
    out[end:] = 0
    return out


def _pack_codes(library: ctypes.CDLL, out: torch.Tensor, source: Source, rows: int, order: torch.Tensor | None) -> None:
    map_ = (torch.arange(256) + source.flip).to(torch.uint8) if source.flip else None
    first = 0
    for block in source.blocks:
        codes = block.contiguous().view(torch.uint8)
        library.qcore_pack_codes(
            *(ctypes.c_void_p(part.data_ptr()) for part in (out, codes)),
            *map(ctypes.c_int64, (codes.shape[1], source.bits, first, first + len(codes))),
            *(ctypes.c_void_p(None if part is None else part.data_ptr()) for part in (order, map_)),
        )
        first += len(codes)
    assert first == rows


def code_bits(code: int) -> int:
    """Bits of one code of a `Header.code`."""
    return code if code <= 8 else code - 16 if code < 32 else 8 if code < 40 else 6


def _line(place: int) -> int:
    return -(-place // _LINE) * _LINE


def _by_panel(part: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """[N, G] -> [panels, G, 16]; rows and groups beyond are zeros."""
    rows, groups = part.shape
    padded = part.new_zeros(-(-rows // _PANEL) * _PANEL, columns or groups)
    padded[:rows, :groups] = part
    return padded.view(-1, _PANEL, padded.shape[1]).transpose(1, 2).contiguous()


def contents_unsupported(what: str) -> Refused:
    return Refused(
        Refusal("contents-unsupported", "notimpl", "qcore_cpu::linear", "it takes finite numbers only", f"found {what}",
                "Another kernel takes this layer.")
    )  # fmt: skip
