"""From blocks to numbers: the definition of every element kind `Block`.

Bit for bit what ggml's own reference gives (src/ggml-quants.c). All of it is plain torch, without loops over blocks, on
whatever device the blocks are on; beside its result it needs about as much memory again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.blocks import iq, kquants, lookup, simple, ternary
from qcore.blocks.types import BLOCK_TYPES, BlockType
from qcore.blocks.unpack import Parts

_DECODERS: Mapping[str, Callable[[Tensor], Parts]] = MappingProxyType(
    {
        "q4_0": simple.q4_0,
        "q4_1": simple.q4_1,
        "q5_0": simple.q5_0,
        "q5_1": simple.q5_1,
        "q8_0": simple.q8_0,
        "q1_0": simple.q1_0,
        "q2_0": simple.q2_0,
        "q2_k": kquants.q2_k,
        "q3_k": kquants.q3_k,
        "q4_k": kquants.q4_k,
        "q5_k": kquants.q5_k,
        "q6_k": kquants.q6_k,
        "iq1_s": iq.iq1_s,
        "iq1_m": iq.iq1_m,
        "iq2_xxs": iq.iq2_xxs,
        "iq2_xs": iq.iq2_xs,
        "iq2_s": iq.iq2_s,
        "iq3_xxs": iq.iq3_xxs,
        "iq3_s": iq.iq3_s,
        "iq4_nl": lookup.iq4_nl,
        "iq4_xs": lookup.iq4_xs,
        "mxfp4": lookup.mxfp4,
        "nvfp4": lookup.nvfp4,
        "tq1_0": ternary.tq1_0,
        "tq2_0": ternary.tq2_0,
    }
)


def dequantize_blocks(name: str, codes: Tensor) -> Tensor:
    """The numbers that blocks of type `name` (a key of BLOCK_TYPES) stand for.

    codes: uint8 [rows, blocks * nbytes], little-endian, on any device; more leading dimensions are allowed. Returns
    float32 [rows, blocks * elements] on the same device. A scale that is infinite or NaN gives what float32 arithmetic
    gives. Raises ValueError for an unknown type, another dtype, or rows that are not whole blocks.
    """
    block = _checked(name, codes)
    values = _DECODERS[name](codes.reshape(-1, block.nbytes)).values()
    return values.view(*codes.shape[:-1], codes.shape[-1] // block.nbytes * block.elements)


def block_parts(name: str, codes: Tensor) -> Parts:
    """Codes, scales and minima of the same blocks, before they are multiplied. codes and errors as in `dequantize_blocks`."""
    return _DECODERS[name](codes.reshape(-1, _checked(name, codes).nbytes))


def byteswap_blocks(name: str, codes: Tensor) -> Tensor:
    """Blocks of a big-endian file as little-endian ones (or the reverse): a copy with every multi-byte field swapped.

    codes and errors as in `dequantize_blocks`. Big-endian fields are those that ggml reads as words on such a machine.
    """
    block = _checked(name, codes)
    swapped = codes.clone(memory_format=torch.contiguous_format)
    blocks = swapped.view(-1, block.nbytes)
    for offset, size, count in block.fields:
        values = blocks[:, offset : offset + size * count].view(-1, count, size)
        values.copy_(values.flip(2))
    return swapped


def _checked(name: str, codes: Tensor) -> BlockType:
    block = BLOCK_TYPES.get(name)
    if block is None:
        raise ValueError(f"unknown block type {name!r}: one of {', '.join(BLOCK_TYPES)}")
    if codes.dtype != torch.uint8 or codes.dim() == 0:
        raise ValueError(f"blocks must be uint8 [rows, bytes], not {codes.dtype} {list(codes.shape)}")
    if codes.shape[-1] % block.nbytes:
        raise ValueError(f"rows of {codes.shape[-1]} bytes are not whole {name} blocks of {block.nbytes} bytes")
    return block
