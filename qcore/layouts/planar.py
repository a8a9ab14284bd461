"""GPTQModel's planar packing (`gptq_p`): codes split into planes whose widths divide a word.

For every 32 codes the planes follow each other, the lowest bits first; a plane of width w is w words that hold its 32
fields as a little-endian bit stream. Sizes are those of the plain stream; 2, 4 and 8 bits are the same in both.
Source: GPTQModel's utils/planar_packing.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the planes of a code, from its lowest bits on."""
RUN = 32
"""Codes whose planes stand together."""


def unpack_planes(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [R, runs * 4 bits] -> codes uint8 [R, runs * 32]."""
    import torch

    from qcore.bits import unpack

    runs = stream.unflatten(-1, (-1, 4 * bits))
    codes = torch.zeros(*runs.shape[:-1], RUN, dtype=torch.uint8)
    offset = 0
    for width in PLANES[bits]:
        codes |= unpack(runs[..., 4 * offset : 4 * (offset + width)], width, RUN) << offset
        offset += width
    return codes.flatten(-2)


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: codes uint8 [R, n], n a multiple of 32 -> uint8 [R, n bits / 8]."""
    import torch

    from qcore.bits import pack

    runs, offset, planes = codes.unflatten(-1, (-1, RUN)), 0, []
    for width in PLANES[bits]:
        planes.append(pack(runs >> offset & ((1 << width) - 1), width))
        offset += width
    return torch.cat(planes, -1).flatten(-2)
