"""How schemes print and parse.

    scheme   W<bits>A<bits> - <weight>                   activations in 16 bits or more
             W<bits>A<bits> - <weight> / <input>         quantized activations
             W<bits>A<bits> - <shorthand>                the well-known pairs of SHORTHANDS
    tensor   [element] - [level + level ...] - [sym | asym | zfloat] - [actorder] - [dyn] - [outliers<threshold>]
    element  int4 uint4 ... fp8 (e4m3fn) e4m3fnuz e5m2 e2m1 e3m2 e2m3 bf16 f16 nf4 fp4 gguf:q4_k
    level    tensor channel token g128 flat64 block128 tile64x32, then :<type> where scales are not floats

A weight-only integer in its normal form (signed and symmetric, or unsigned with a zero point) leaves its element out:
`W4A16-g128-sym`. Every scheme has one printed form, and it parses back to an equal scheme.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from qcore.refusal import Refusal, Refused
from qcore.scheme import (
    CODEBOOK_BITS,
    FLOAT_BITS,
    Block,
    Codebook,
    Element,
    FlatGroup,
    Float,
    Granularity,
    Group,
    Int,
    Level,
    PerChannel,
    PerTensor,
    PerToken,
    Scheme,
    TensorScheme,
    Tile,
    integer_weight,
)

_FP8 = Float("e4m3fn")
_INT8 = Int(8, signed=True)
_E2M1 = Float("e2m1")
_NVFP4 = (Level(Group(16), "e4m3fn"), Level(PerTensor()))
_MX = (Level(Group(32), "e8m0"),)


def _dynamic(element: Element, *levels: Level) -> TensorScheme:
    return TensorScheme(element, levels, dynamic=True)


SHORTHANDS: dict[str, Scheme] = {
    "W8A8-int8-dyn": Scheme(TensorScheme(_INT8, (Level(PerChannel()),)), _dynamic(_INT8, Level(PerToken()))),
    "W8A8-int8-static": Scheme(TensorScheme(_INT8, (Level(PerChannel()),)), TensorScheme(_INT8, (Level(PerTensor()),))),
    "W8A8-fp8-dyn": Scheme(TensorScheme(_FP8, (Level(PerChannel()),)), _dynamic(_FP8, Level(PerToken()))),
    "W8A8-fp8-static": Scheme(TensorScheme(_FP8, (Level(PerTensor()),)), TensorScheme(_FP8, (Level(PerTensor()),))),
    "W8A8-fp8-block128": Scheme(TensorScheme(_FP8, (Level(Tile(128, 128)),)), _dynamic(_FP8, Level(Group(128)))),
    "W4A4-nvfp4": Scheme(TensorScheme(_E2M1, _NVFP4), _dynamic(_E2M1, *_NVFP4)),
    "W4A16-nvfp4": Scheme(TensorScheme(_E2M1, _NVFP4)),
    "W4A4-mxfp4": Scheme(TensorScheme(_E2M1, _MX), _dynamic(_E2M1, *_MX)),
    "W4A16-mxfp4": Scheme(TensorScheme(_E2M1, _MX)),
    "W8A8-mxfp8": Scheme(TensorScheme(_FP8, _MX), _dynamic(_FP8, *_MX)),
}

PRESETS: dict[str, Scheme] = {
    "W4A16": Scheme(integer_weight(4, Group(128), symmetric=True)),
    "W4A16_ASYM": Scheme(integer_weight(4, Group(128), symmetric=False)),
    "W8A16": Scheme(integer_weight(8, PerChannel(), symmetric=True)),
    "INT8": SHORTHANDS["W8A8-int8-dyn"],
    "W8A8": SHORTHANDS["W8A8-int8-dyn"],
    "FP8": SHORTHANDS["W8A8-fp8-static"],
    "FP8_DYNAMIC": SHORTHANDS["W8A8-fp8-dyn"],
    "FP8_BLOCK": SHORTHANDS["W8A8-fp8-block128"],
    "NVFP4": SHORTHANDS["W4A4-nvfp4"],
    "MXFP4": SHORTHANDS["W4A4-mxfp4"],
}
"""LLM Compressor's preset names."""

_SHORT_NAMES: dict[Scheme, str] = {scheme: name for name, scheme in SHORTHANDS.items()}


def format_scheme(scheme: Scheme) -> str:
    """The scheme's one printed form."""
    if scheme in _SHORT_NAMES:
        return _SHORT_NAMES[scheme]
    weight = format_tensor_scheme(scheme.weight)
    activation_bits = scheme.input.bits if scheme.input else 16
    if scheme.input:
        weight += f"/{format_tensor_scheme(scheme.input)}"
    elif _normal_form(scheme.weight):
        weight = weight.partition("-")[2]
    return f"W{scheme.weight.bits}A{activation_bits}-{weight}"


def format_tensor_scheme(scheme: TensorScheme) -> str:
    """The tensor scheme's one printed form."""
    words = [_format_element(scheme.element)]
    if scheme.scales:
        words.append("+".join(_format_level(level) for level in scheme.scales))
    if isinstance(scheme.element, Int):
        words.append({None: "sym", "stored": "asym", "float": "zfloat"}[scheme.zero])
    if scheme.ordered:
        words.append("actorder")
    if scheme.dynamic:
        words.append("dyn")
    if scheme.outliers is not None:
        words.append(f"outliers{scheme.outliers!r}")
    return "-".join(words)


def parse_scheme(text: str) -> Scheme:
    """A printed scheme or a preset's name. Raises Refused (bad-scheme)."""
    known = PRESETS.get(text) or SHORTHANDS.get(text)
    if known:
        return known
    head = re.fullmatch(r"W(\d+)A(\d+)-(.+)", text)
    if not head:
        raise _bad_scheme(text, "a scheme begins with W<bits>A<bits>-")
    weight_text, slash, input_text = head[3].partition("/")
    if not slash and re.match(r"(tensor|channel|g\d|flat\d|block\d|tile\d)", weight_text):
        sign = "" if "-sym" in weight_text else "u"
        weight_text = f"{sign}int{head[1]}-{weight_text}"
    try:
        weight = _parse_tensor(weight_text)
        scheme = Scheme(weight, _parse_tensor(input_text) if slash else None)
    except ValueError as error:
        raise _bad_scheme(text, str(error)) from error
    bits = (scheme.weight.bits, scheme.input.bits if scheme.input else 16)
    if (int(head[1]), int(head[2])) != bits:
        raise _bad_scheme(text, f"it says W{head[1]}A{head[2]}, its parts say W{bits[0]}A{bits[1]}")
    return scheme


def parse_tensor_scheme(text: str) -> TensorScheme:
    """A printed tensor scheme. Raises Refused (bad-scheme)."""
    try:
        return _parse_tensor(text)
    except ValueError as error:
        raise _bad_scheme(text, str(error)) from error


def _normal_form(scheme: TensorScheme) -> bool:
    return (
        isinstance(scheme.element, Int)
        and bool(scheme.scales)
        and scheme.element.signed == (scheme.zero is None)
        and not scheme.dynamic
    )


def _format_element(element: Element) -> str:
    if isinstance(element, Int):
        return f"{'' if element.signed else 'u'}int{element.bits}"
    if isinstance(element, Float):
        return "fp8" if element.format == "e4m3fn" else element.format
    return element.name if isinstance(element, Codebook) else f"gguf:{element.type}"


def _parse_element(text: str) -> Element:
    if integer := re.fullmatch(r"(u?)int(\d)", text):
        return Int(int(integer[2]), signed=not integer[1])
    if text.startswith("gguf:"):
        return Block(text[5:])
    if text in CODEBOOK_BITS:
        return Codebook(text)  # type: ignore[arg-type]
    if text == "fp8" or (text in FLOAT_BITS and text != "e4m3fn"):
        return Float("e4m3fn" if text == "fp8" else text)  # type: ignore[arg-type]
    raise ValueError(f"unknown element {text!r}")


def _format_level(level: Level) -> str:
    name = _format_granularity(level.granularity)
    return name if level.type == "float" else f"{name}:{level.type}"


def _format_granularity(granularity: Granularity) -> str:
    if isinstance(granularity, Tile):
        square = granularity.rows == granularity.cols
        return f"block{granularity.rows}" if square else f"tile{granularity.rows}x{granularity.cols}"
    if isinstance(granularity, Group):
        return f"g{granularity.size}"
    if isinstance(granularity, FlatGroup):
        return f"flat{granularity.size}"
    return {PerTensor: "tensor", PerChannel: "channel", PerToken: "token"}[type(granularity)]


_GRANULARITIES: tuple[tuple[str, Callable[..., Granularity]], ...] = (
    (r"tensor", PerTensor),
    (r"channel", PerChannel),
    (r"token", PerToken),
    (r"g(\d+)", Group),
    (r"flat(\d+)", FlatGroup),
    (r"block(\d+)", lambda side: Tile(side, side)),
    (r"tile(\d+)x(\d+)", Tile),
)


def _parse_level(text: str) -> Level:
    name, colon, scale_type = text.partition(":")
    for pattern, make in _GRANULARITIES:
        if match := re.fullmatch(pattern, name):
            granularity = make(*(int(size) for size in match.groups()))
            return Level(granularity, scale_type if colon else "float")  # type: ignore[arg-type]
    raise ValueError(f"unknown granularity {name!r}")


def _parse_tensor(text: str) -> TensorScheme:
    words = re.split(r"-(?!\d)", text)  # a digit after the dash belongs to an exponent
    element = _parse_element(words.pop(0))
    levels: tuple[Level, ...] = ()
    if words and re.match(r"(tensor|channel|token|g\d|flat\d|block\d|tile\d)", words[0]):
        levels = tuple(_parse_level(level) for level in words.pop(0).split("+"))
    zero = None
    if isinstance(element, Int):
        word = words.pop(0) if words else ""
        if word not in ("sym", "asym", "zfloat"):
            raise ValueError("an integer says sym, asym or zfloat")
        zero = {"sym": None, "asym": "stored", "zfloat": "float"}[word]
    ordered, dynamic = (bool(words and words[0] == flag and words.pop(0)) for flag in ("actorder", "dyn"))
    outliers = float(words.pop(0)[8:]) if words and words[0].startswith("outliers") else None
    if words:
        raise ValueError(f"unknown word {words[0]!r}")
    return TensorScheme(element, levels, zero, ordered, dynamic, outliers)  # type: ignore[arg-type]


def _bad_scheme(text: str, why: str) -> Refused:
    fix = f"Write a scheme such as W4A16-g128-sym, or a preset: {', '.join(PRESETS)}."
    return Refused(Refusal("bad-scheme", "usage", text, "this is not a scheme", why, fix))
