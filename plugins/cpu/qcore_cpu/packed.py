"""Packed weights: the canonical layout rearranged, once, into the one that the native kernels stream (native/packed.h)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import torch

from qcore.pages import fresh_bytes, huge_pages
from qcore.refusal import Refusal, Refused
from qcore_cpu.library import register

if TYPE_CHECKING:
    from collections.abc import Iterable
    from mmap import mmap


_PANEL, CHUNK, _LINE = 16, 32, 64
_MAGIC, _VERSION = 0x55504345524F4351, 1

TABLE3, TABLE4 = 19, 20
"""Header.code of codebooks of 3 and 4 bits."""
FLOATS = {"e4m3fn": 32, "e4m3": 32, "e4m3fnuz": 33, "e5m2": 34, "e3m2": 40, "e2m3": 41}
"""Header.code of small floats."""
F16 = 1
FLOAT_SCALES = {torch.float32: 0, torch.float16: F16, torch.bfloat16: 2}
E8M0, E4M3, RUNS, NIBBLES, TABLE8 = 3, 4, 5, 6, 7
ZERO_U8, ZERO_S8, FLOAT_OFFSET, RUN_OFFSETS, NIBBLE_OFFSETS = 1, 2, 3, 4, 5
EXACT, BLOCKS, TOKEN, STATIC, FLOAT_TOKEN, FLOAT_STATIC, FLOAT_BLOCKS = range(7)


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
    """Codes, some rows after the other: uint8 [rows, bytes], a bit stream of `bits` bits. Every part but the last has a multiple of
    16 rows. flip: what is added to each code, in 8 bits."""

    parts: Iterable[torch.Tensor]
    bits: int
    flip: int = 0


@dataclass
class Blocks:
    """ggml's blocks: uint8 [rows, bytes]. type: its number of their type, codes and scales of which are taken apart natively; 0: they
    are kept as they are."""

    rows: torch.Tensor
    type: int


@dataclass
class Parts:
    """A weight in the kernels' words, before it is laid out.

    scales, offsets: [N, groups] in the dtype that is stored; super_scales, super_offsets: [N, ...] above them. None of them where
    codes are blocks.
    """

    header: Header
    codes: Source | Blocks
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_offsets: torch.Tensor | None = None
    order: torch.Tensor | None = None
    table: torch.Tensor | None = None


class _Room:
    """Memory that weights share: many are smaller than a huge page. Threads may take from it at once."""

    SIZE = 16 << 20

    def __init__(self) -> None:
        self.memory: mmap | None = None
        self.place = self.end = 0
        self.lock = Lock()

    def take(self, count: int) -> torch.Tensor:
        """uint8 [count] at a line of the cache."""
        if count > self.SIZE // 2:
            return fresh_bytes(count)
        with self.lock:
            if self.memory is None or self.place + count > self.end:
                self.memory, self.place = huge_pages(self.SIZE)
                self.end = self.place + self.SIZE
            taken = torch.frombuffer(self.memory, dtype=torch.uint8, count=count, offset=self.place)
            self.place = -(-(self.place + count) // _LINE) * _LINE
        return taken


_ROOM = _Room()


def header_of(packed: torch.Tensor) -> Header:
    """A copy of the header of what `lay_out` made."""
    return Header.from_buffer_copy(packed[: ctypes.sizeof(Header)].numpy().tobytes())


def input_of(packed: torch.Tensor) -> torch.Tensor:
    """int64 [1]: Header.input of what `lay_out` made, in its place."""
    place = Header.input.offset
    return packed[place : place + 8].view(torch.int64)


def lay_out(parts: Parts) -> torch.Tensor:
    """The header and its sections in one block of bytes, each section at a line of the cache. Raises Refused
    (contents-unsupported) where a block's scale is no number."""
    header, library = parts.header, register()
    header.magic, header.version = _MAGIC, _VERSION
    header.padded = -(-header.columns // CHUNK) * CHUNK
    header.group = min(header.group, header.padded)
    header.groups = -(-header.padded // header.group)
    panels = -(-header.rows // _PANEL)
    given = {name: getattr(parts, name) for name in _SECTIONS}
    order = None
    if parts.order is not None:
        order = torch.nn.functional.pad(parts.order.to(torch.int32), (0, header.padded - header.columns))
    blocks = parts.codes if isinstance(parts.codes, Blocks) else None
    sizes = {
        "codes": blocks.rows.numel() if blocks and not blocks.type else panels * header.padded * _PANEL * code_bits(header.code) // 8,
        **(_block_sections(header) if blocks and blocks.type else {}),
        **{name: panels * _PANEL * _columns(name, part, header) * part.itemsize for name, part in given.items() if part is not None},
        **{name: part.nbytes for name, part in (("order", order), ("table", parts.table)) if part is not None},
    }  # fmt: skip
    place = ctypes.sizeof(Header)
    for name, size in sizes.items():
        setattr(header, name, place)
        place = -(-(place + size) // _LINE) * _LINE
    header.total = place
    out = _ROOM.take(place)
    out[: header.codes] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for name, size in sizes.items():  # what lies behind a section, up to the next one's line
        end = getattr(header, name) + size
        out[end : -(-end // _LINE) * _LINE] = 0
    if isinstance(parts.codes, Source):
        _pack_codes(library, out, parts.codes, header.rows, order)
    elif parts.codes.type:
        _pack_blocks(library, out, parts.codes)
    else:
        out[header.codes : header.codes + sizes["codes"]] = parts.codes.rows.flatten()
    for name, part in given.items():
        if part is not None:
            _pack_cells(library, out[getattr(header, name) :], part, _columns(name, part, header))
    for name, part in (("order", order), ("table", parts.table)):
        if part is not None:
            start = getattr(header, name)
            out[start : start + sizes[name]] = part.contiguous().view(-1).view(torch.uint8)
    return out


_SECTIONS = ("scales", "offsets", "super_scales", "super_offsets")


def _columns(name: str, part: torch.Tensor, header: Header) -> int:
    """Columns of a section."""
    return part.shape[1] if name.startswith("super") else int(header.groups)


def _block_sections(header: Header) -> dict[str, int]:
    """Bytes of the sections that are filled from ggml's blocks."""
    rows = -(-header.rows // _PANEL) * _PANEL
    cells, above = rows * header.groups, 2 * rows * -(-header.padded // 256)
    sizes = {"scales": cells * (2 if header.scale == F16 else 1)}
    if header.offset in (FLOAT_OFFSET, RUN_OFFSETS):
        sizes["offsets"] = sizes["scales"]
    if header.scale in (RUNS, NIBBLES):
        sizes["super_scales"] = above
    if header.offset in (RUN_OFFSETS, NIBBLE_OFFSETS):
        sizes["super_offsets"] = above
    return sizes


def _pack_codes(library: ctypes.CDLL, out: torch.Tensor, source: Source, rows: int, order: torch.Tensor | None) -> None:
    first = 0
    for part in source.parts:
        codes = part.contiguous().view(torch.uint8)
        library.qcore_pack_codes(
            ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(codes.data_ptr()),
            *map(ctypes.c_int64, (codes.shape[1], source.bits, first, first + len(codes))),
            ctypes.c_void_p(None if order is None else order.data_ptr()), ctypes.c_int64(source.flip),
        )  # fmt: skip
        first += len(codes)
    assert first == rows


def _pack_blocks(library: ctypes.CDLL, out: torch.Tensor, blocks: Blocks) -> None:
    rows = blocks.rows.contiguous()
    finite = library.qcore_pack_blocks(
        ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(rows.data_ptr()), ctypes.c_int64(rows.shape[1]), ctypes.c_int64(blocks.type)
    )  # fmt: skip
    if not finite:
        raise contents_unsupported("scales that are no numbers")


def _pack_cells(library: ctypes.CDLL, out: torch.Tensor, cells: torch.Tensor, padded: int) -> None:
    """[N, G] -> [panels, padded, 16]; rows and columns beyond are zeros."""
    part = cells.contiguous()
    library.qcore_pack_cells(
        ctypes.c_void_p(part.data_ptr()), *map(ctypes.c_int64, (*part.shape, part.element_size(), padded)), ctypes.c_void_p(out.data_ptr())
    )  # fmt: skip


def code_bits(code: int) -> int:
    """Bits of one code of a `Header.code`."""
    return code if code <= 8 else code - 16 if code < 32 else 8 if code < 40 else 6


def contents_unsupported(what: str) -> Refused:
    return Refused(
        Refusal("contents-unsupported", "notimpl", "qcore_cpu::linear", "it takes finite numbers only", f"found {what}",
                "Another kernel takes this layer.")
    )  # fmt: skip
