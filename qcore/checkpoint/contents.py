"""What a decoded layer's parts must hold, whatever the format: shapes and numbers are held against the scheme in one place.

Methods refuse what they find by the name of its tensor; this stands behind all of them, and behind plugins' methods too.

    scales       finite, e8m0 no NaN (255); not negative where they scale floats or a codebook, whose writers take them from
                 magnitudes. Scales of integers and of ggml's blocks may be negative (AutoRound's and llama.cpp's are)
    zero points  whole numbers that a code can be, or finite floats
    index        groups that there are
    codes        of floats no NaN or infinity: every writer saturates. Of ggml's blocks, finite scales and minima, and in
                 MXFP4 no 255, as in ggml_validate_row_data
    inputs       one finite, positive scale; a zero point that an int8 holds; a finite multiplier for every column
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.checkpoint.finite import all_finite
from qcore.elements import Block, Codebook, Float, Int, Level
from qcore.refusal import Refused, bad_file

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors, QuantizedTensor

_NOT_FINITE = {"float8_e4m3fn": (0x7F, 0x7F), "float8_e5m2": (0x7C, 0x7C), "float8_e4m3fnuz": (0xFF, 0x80)}
"""By torch's name: the bits of a code that tell, and what they are where it is no number (of e5m2 the exponent)."""
_PIECE = 1 << 22
"""Codes looked at at once."""


def check_layer(layer: LayerTensors, *, file: Path, module: str) -> LayerTensors:
    """The layer. Raises Refused (bad-content, bad-shape, missing-tensor) with the part that is wrong as its field."""

    def no(code: str, field: str, reason: str, found: object, expected: object) -> Refused:
        return bad_file(code, reason, file=file, tensor=module, field=field, found=found, expected=expected)

    for field, shape, wanted in _shapes(layer):
        if shape != wanted:
            raise no("bad-shape", field, "a part of the layer does not fit the others", list(shape), list(wanted))
    for field, wrong, expected in _contents(layer.weight):
        if wrong:
            raise no("bad-content", field, "a part of the layer holds what its format does not allow", wrong, expected)
    for field, wrong, expected in _inputs(layer):
        if wrong:
            code = "missing-tensor" if wrong == "nothing" else "bad-content"
            raise no(code, field, "the layer's inputs cannot be quantized like this", wrong, expected)
    return layer


def _shapes(layer: LayerTensors) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Parts whose shapes QuantizedTensor leaves open: their names, their shapes, and those that the others ask for."""
    weight = layer.weight
    *experts, rows, columns = weight.shape
    bits, element = weight.scheme.weight.bits, weight.scheme.weight.element
    for field, part, wanted in (
        ("zero points", weight.zeros, tuple(weight.scales[0].shape) if weight.scales else ()),
        ("index", weight.index, (columns,)),
        ("table", weight.table, (1 << bits,) if isinstance(element, Codebook) else ()),
        ("bias", layer.bias, (*experts, rows)),
        ("input_multiplier", layer.input_multiplier, (*experts, columns)),
    ):
        if part is not None:
            yield field, tuple(part.shape), wanted
    given = weight.scheme.input
    stored = given is not None and (not given.dynamic or len(given.scales) > 1)
    for field, part in (("input_scale", layer.input_scale), ("input_zero", layer.input_zero)):
        if part is not None and stored:
            yield field, (part.numel(),), (experts[0] if experts else 1,)


def _contents(weight: QuantizedTensor) -> Iterator[tuple[str, str, str]]:
    """Parts of the weight: the name, what is wrong with it (nothing, where it is right), and what is allowed."""
    scheme = weight.scheme.weight
    for level, scale in zip(scheme.scales, weight.scales, strict=True):
        yield (
            "scales",
            _wrong_scale(level, scale, signed=isinstance(scheme.element, Int)),
            "finite scales, not negative",
        )
    for field, part in (("table", weight.table), ("scale table", weight.scale_table), ("offset", weight.offset)):
        if part is not None:
            yield field, _not_finite(part), "finite numbers"
    if weight.zeros is not None:
        yield "zero points", _wrong_zeros(weight), "finite numbers, of stored ones those that a code can be"
    if weight.index is not None:
        groups = weight.scales[0].shape[-1]
        yield "index", _outside(weight.index, 0, groups - 1), f"0 to {groups - 1}"
    if isinstance(scheme.element, Float):
        yield "codes", _wrong_codes(weight.codes), "finite numbers"
    if isinstance(scheme.element, Block):
        yield "blocks", _wrong_blocks(scheme.element.type, weight.codes), "finite scales and minima"


def _inputs(layer: LayerTensors) -> Iterator[tuple[str, str, str]]:
    given = layer.weight.scheme.input
    scale, zero, multiplier = layer.input_scale, layer.input_zero, layer.input_multiplier
    if scale is not None:
        yield (
            "input_scale",
            _not_finite(scale) or _outside(scale, 0, float("inf"), above=True),
            "a finite number above 0",
        )
    elif given is not None and not given.dynamic:
        yield "input_scale", "nothing", "the inputs' static scale"
    if zero is not None:
        yield "input_zero", _not_finite(zero) or _outside(zero, -128, 127), "a whole number of -128 to 127"
    if multiplier is not None:
        yield "input_multiplier", _not_finite(multiplier), "finite numbers"


def _wrong_scale(level: Level, scale: torch.Tensor, *, signed: bool) -> str:
    if level.type == "dynamic8":
        return ""  # indexes of a table that has all of them
    if level.type == "e8m0":
        return "NaN (255)" if bool((scale == 255).any()) else ""
    wide = scale.float() if scale.element_size() == 1 else scale
    negative = "" if signed and level.type == "float" else _outside(wide, 0, float("inf"))
    return _not_finite(wide) or negative


def _wrong_zeros(weight: QuantizedTensor) -> str:
    assert weight.zeros is not None
    element = weight.scheme.weight.element
    if weight.scheme.weight.zero == "float" or not isinstance(element, Int):
        return _not_finite(weight.zeros)
    least = -(1 << element.bits - 1) if element.signed else 0
    return _outside(weight.zeros, least, least + (1 << element.bits) - 1)


def _wrong_codes(codes: torch.Tensor) -> str:
    """What among torch's small floats is no number; others have no such codes."""
    import torch

    name = str(codes.dtype).removeprefix("torch.")
    if name not in _NOT_FINITE:
        return ""
    mask, value = _NOT_FINITE[name]
    for piece in codes.contiguous().view(torch.uint8).flatten().split(_PIECE):
        if bool(((piece & mask) == value).any()):
            return "NaN or infinity"
    return ""


def _wrong_blocks(kind: str, codes: torch.Tensor) -> str:
    """What is wrong with the scales of ggml's blocks."""
    import torch

    from qcore.blocks.types import BLOCK_TYPES

    block = BLOCK_TYPES[kind]
    rows = codes.reshape(-1, block.nbytes)
    if kind == "mxfp4":
        return "NaN (255)" if bool((rows[:, 0] == 255).any()) else ""
    if not block.fields:
        return ""
    at, size, count = block.fields[0]  # the first is the block's scale, and its minimum where it has one
    found = rows[:, at : at + size * count].view(torch.float16)
    if kind == "iq1_m":  # the scale's four hex digits stand on top of four words
        words = found.view(torch.int16).int()
        digits = [(word >> 12 & 15) << 4 * i for i, word in enumerate(words.unbind(1))]
        found = torch.stack(digits).sum(0).to(torch.int16).view(torch.float16)
    return _not_finite(found)


def _not_finite(values: torch.Tensor) -> str:
    return "" if all_finite(values) else "NaN or infinity"


def _outside(values: torch.Tensor, least: float, most: float, *, above: bool = False) -> str:
    """The range of values that are not all from `least` (or above it) to `most`; nothing where they are."""
    if not values.numel():
        return ""
    low, high = float(values.min()), float(values.max())
    fits = (low > least if above else low >= least) and high <= most
    return "" if fits else f"{low:g} to {high:g}"
