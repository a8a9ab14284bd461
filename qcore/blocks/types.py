"""ggml's tensor types: ids, block sizes and the layout that a change of byte order needs to know.

Source: ggml's include/ggml.h (ids) and src/ggml-common.h (block structs). This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Field = tuple[int, int, int]
"""(offset in the block, bytes per value, number of values) of a run of multi-byte little-endian values."""

_D: tuple[Field, ...] = ((0, 2, 1),)
_D_AND_MIN: tuple[Field, ...] = ((0, 2, 2),)


@dataclass(frozen=True)
class BlockType:
    """One quantized type: `elements` consecutive weights of a row are stored together in `nbytes` bytes.

    name: ggml's name in lower case. id: the number that GGUF files store. bits: nominal bits of one code, without the
    scales. fields: the block's multi-byte values; all else in the block is single bytes.
    """

    name: str
    id: int
    elements: int
    nbytes: int
    bits: int
    fields: tuple[Field, ...]


_ROWS = (
    BlockType("q4_0", 2, 32, 18, 4, _D),
    BlockType("q4_1", 3, 32, 20, 4, _D_AND_MIN),
    # The fifth bits of q5_0 and q5_1 are declared as four bytes, but written and read as one 32-bit word.
    BlockType("q5_0", 6, 32, 22, 5, (*_D, (2, 4, 1))),
    BlockType("q5_1", 7, 32, 24, 5, (*_D_AND_MIN, (4, 4, 1))),
    BlockType("q8_0", 8, 32, 34, 8, _D),
    BlockType("q2_k", 10, 256, 84, 2, ((80, 2, 2),)),
    BlockType("q3_k", 11, 256, 110, 3, ((108, 2, 1),)),
    BlockType("q4_k", 12, 256, 144, 4, _D_AND_MIN),
    BlockType("q5_k", 13, 256, 176, 5, _D_AND_MIN),
    BlockType("q6_k", 14, 256, 210, 6, ((208, 2, 1),)),
    # Of each pair of words in iq2_xxs the first is read as four bytes, only the second as a 32-bit word.
    BlockType("iq2_xxs", 16, 256, 66, 2, (*_D, *((6 + 8 * i, 4, 1) for i in range(8)))),
    BlockType("iq2_xs", 17, 256, 74, 2, (*_D, (2, 2, 32))),
    BlockType("iq3_xxs", 18, 256, 98, 3, (*_D, (66, 4, 8))),
    BlockType("iq1_s", 19, 256, 50, 1, (*_D, (34, 2, 8))),
    BlockType("iq4_nl", 20, 32, 18, 4, _D),
    BlockType("iq3_s", 21, 256, 110, 3, _D),
    BlockType("iq2_s", 22, 256, 82, 2, _D),
    BlockType("iq4_xs", 23, 256, 136, 4, (*_D, (2, 2, 1))),
    BlockType("iq1_m", 29, 256, 56, 1, ((48, 2, 4),)),
    BlockType("tq1_0", 34, 256, 54, 1, ((52, 2, 1),)),
    BlockType("tq2_0", 35, 256, 66, 2, ((64, 2, 1),)),
    BlockType("mxfp4", 39, 32, 17, 4, ()),
    BlockType("nvfp4", 40, 64, 36, 4, ()),
    BlockType("q1_0", 41, 128, 18, 1, _D),
    BlockType("q2_0", 42, 64, 18, 2, _D),
)

BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType({row.name: row for row in _ROWS})
"""Every block type that files store, by its name. Q8_1 (9) and Q8_K (15) are absent: they only hold activations."""

BY_ID: Mapping[int, BlockType] = MappingProxyType({row.id: row for row in _ROWS})
"""The same, by ggml's type id."""

PLAIN_TYPES: Mapping[int, tuple[str, int]] = MappingProxyType(
    {
        0: ("F32", 4),
        1: ("F16", 2),
        24: ("I8", 1),
        25: ("I16", 2),
        26: ("I32", 4),
        27: ("I64", 8),
        28: ("F64", 8),
        30: ("BF16", 2),
    }
)
"""Types without blocks, by ggml's type id: (name, bytes per value)."""

REMOVED_IDS: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
"""Ids that ggml once gave and has withdrawn, with the names they had."""
