"""ggml's blocks as codes with scales beside them, which is how every other format holds a weight: the same numbers.

A block's scales times the scales of its runs become one float32 scale a run, exactly; a minimum becomes a float zero point.
Types that look their values up have no codes of their own that are evenly spaced: what they look up are integers of 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block
from qcore.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import QuantizedTensor

_SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "q4_0": "W4A16-g32-sym", "q4_1": "W4A16-g32-zfloat",
        "q5_0": "W5A16-g32-sym", "q5_1": "W5A16-g32-zfloat", "q8_0": "W8A16-g32-sym",
        "q1_0": "W2A16-g128-sym", "q2_0": "W2A16-g64-asym", "tq1_0": "W2A16-g256-sym", "tq2_0": "W2A16-g256-asym",
        "q2_k": "W2A16-g16-zfloat", "q3_k": "W3A16-g16-sym", "q4_k": "W4A16-g32-zfloat", "q5_k": "W5A16-g32-zfloat",
        "q6_k": "W6A16-g16-sym",
        "iq1_s": "W8A16-g32-sym", "iq1_m": "W8A16-g16-sym", "iq2_xxs": "W8A16-g32-sym", "iq2_xs": "W8A16-g16-sym",
        "iq2_s": "W8A16-g16-sym", "iq3_xxs": "W8A16-g32-sym", "iq3_s": "W8A16-g32-sym", "iq4_nl": "W8A16-g32-sym",
        "iq4_xs": "W8A16-g32-sym",
        "mxfp4": "W4A16-mxfp4", "nvfp4": "W4A16-nvfp4",
    }
)  # fmt: skip


def unblocked_scheme(scheme: Scheme) -> Scheme:
    """The scheme of the same numbers without a block type; any other scheme as it is."""
    element = scheme.weight.element
    return replace(Scheme.parse(_SCHEMES[element.type]), input=scheme.input) if isinstance(element, Block) else scheme


def unblocked(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight [N, K] of `unblocked_scheme`; any other weight as it is."""
    import torch

    from qcore.bits import pack
    from qcore.blocks.dequantize import block_parts
    from qcore.tensor import QuantizedTensor

    if not isinstance(element := weight.scheme.weight.element, Block):
        return weight
    scheme, (rows, columns) = unblocked_scheme(weight.scheme), weight.shape
    if element.type in ("mxfp4", "nvfp4"):
        return _floats(weight, element.type, scheme)
    codes, scale, minimum = block_parts(element.type, weight.codes)
    codes, scale = codes.reshape(rows, columns), scale.reshape(rows, -1)
    plain = scheme.weight
    zeros = None
    if plain.zero == "float":
        assert minimum is not None
        zeros = -minimum.reshape(rows, -1)
    elif plain.zero == "stored":  # codes of -1 to 2
        codes, zeros = codes + 1, torch.ones_like(scale, dtype=torch.uint8)
    elif plain.bits < 8:
        codes = codes + (1 << (plain.bits - 1))
    stored = codes.contiguous() if plain.bits == 8 else pack(codes.to(torch.uint8), plain.bits)
    return QuantizedTensor(scheme, weight.shape, stored, (scale.contiguous(),), zeros)


def _floats(weight: QuantizedTensor, kind: str, scheme: Scheme) -> QuantizedTensor:
    """mxfp4 and nvfp4: scales stand before the codes, whose halves lie in the low and in the high nibbles."""
    import torch

    from qcore.bits import pack
    from qcore.blocks.unpack import planes
    from qcore.tensor import QuantizedTensor

    rows, columns = weight.shape
    blocks = weight.codes.reshape(-1, BLOCK_TYPES[kind].nbytes)
    if kind == "mxfp4":
        stored, runs = blocks[:, :1], blocks[:, 1:]
        scales: tuple[torch.Tensor, ...] = (stored.reshape(rows, -1).contiguous(),)
    else:
        stored, runs = blocks[:, :4] & 127, blocks[:, 4:].reshape(-1, 4, 8)
        fine = stored.masked_fill(stored == 127, 0).reshape(rows, -1)
        scales = (fine.contiguous().view(torch.float8_e4m3fn), torch.ones(1, 1))
    return QuantizedTensor(scheme, weight.shape, pack(planes(runs, 4).reshape(rows, columns), 4), scales)
