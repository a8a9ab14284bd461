"""What the numbers of a quantized layer mean: data types, granularity and symmetry, and nothing else.

How a checkpoint was made (GPTQ, AWQ), how it is packed on disk and which kernel likes it stay out, so that two formats
with the same numbers have the same `Scheme` and share kernels. A float scale's own width (f32, f16, bf16) is a property
of the tensor that holds it, not of the scheme; scales that are quantized themselves are part of it.

Every scheme has one printed form, and it parses back to an equal scheme (qcore.elements has the words):

    scheme   W<bits>A<bits> - <weight>                   activations in 16 bits or more
             W<bits>A<bits> - <weight> / <input>         quantized activations
             W<bits>A<bits> - <shorthand>                the well-known pairs of SHORTHANDS
    tensor   [element] - [level + level ...] - [sym | asym | zfloat] - [actorder] - [dyn] - [outliers<threshold>] - [bound<magnitude>]

A weight-only integer in its normal form (signed and symmetric, or unsigned with a zero point) leaves its element out:
`W4A16-g128-sym`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from qcore.elements import (
    Block,
    Element,
    Float,
    Granularity,
    Group,
    Int,
    Level,
    PerChannel,
    PerTensor,
    PerToken,
    Tile,
    one_of,
    parse_element,
    parse_level,
)
from qcore.refusal import Refusal, Refused

Zero = Literal["stored", "float"]
"""stored: an integer code z, w = (q - z) * s. float: a float z, w = q * s + z."""

_LEVEL = r"(tensor|channel|token|g\d|flat\d|block\d|tile\d)"
"""How a level of scales begins."""


@dataclass(frozen=True)
class TensorScheme:
    """One quantized tensor: a weight, a layer's input, or a kv cache.

    scales: from the finest level to the coarsest; their product is the scale. Empty for Block and for plain floats.
    ordered: the group of column k is index[k] (act-order), not k // size.
    dynamic: scales are computed at run time (inputs and kv caches only).
    outliers: inputs only; columns with a value beyond this magnitude stay in 16 bits (LLM.int8).
    bound: inputs only; run-time scales are those of magnitudes up to this one (FBGEMM's activation_scale_ub).
    """

    element: Element
    scales: tuple[Level, ...] = ()
    zero: Zero | None = None
    ordered: bool = False
    dynamic: bool = False
    outliers: float | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.element, Block) and (self.scales or self.zero or self.ordered):
            raise ValueError("a block type holds its scales and zero points inside")
        if self.zero is not None:
            one_of("zero", self.zero, get_args(Zero))
            if not isinstance(self.element, Int):
                raise ValueError("only integers have zero points")
        if self.ordered and not any(isinstance(level.granularity, Group) for level in self.scales):
            raise ValueError("act-order needs groups")
        if self.outliers is not None and not self.outliers > 0:
            raise ValueError("the outlier threshold is a positive magnitude")
        if self.bound is not None and not (self.bound > 0 and self.dynamic):
            raise ValueError("the bound of scales that are found at run time is a positive magnitude")

    @property
    def bits(self) -> int:
        """Bits of one stored code, scales not counted."""
        return self.element.bits

    @property
    def granularity(self) -> Granularity | None:
        """That of the finest level of scales; None where there is none."""
        return self.scales[0].granularity if self.scales else None

    def __str__(self) -> str:
        words = [str(self.element)]
        if self.scales:
            words.append("+".join(map(str, self.scales)))
        if isinstance(self.element, Int):
            words.append({None: "sym", "stored": "asym", "float": "zfloat"}[self.zero])
        if self.ordered:
            words.append("actorder")
        if self.dynamic:
            words.append("dyn")
        if self.outliers is not None:
            words.append(f"outliers{self.outliers!r}")
        if self.bound is not None:
            words.append(f"bound{self.bound!r}")
        return "-".join(words)

    @classmethod
    def parse(cls, text: str) -> TensorScheme:
        """The inverse of str(). Raises Refused (bad-scheme)."""
        try:
            return _parse_tensor(text)
        except ValueError as error:
            raise _bad_scheme(text, str(error)) from error


@dataclass(frozen=True)
class Scheme:
    """One linear layer: its weight and, where activations are quantized too, its input."""

    weight: TensorScheme
    input: TensorScheme | None = None

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.outliers is not None:  # nor a bound, which goes with dynamic scales
            raise ValueError("a weight's scales are stored, and it has no outliers")
        if any(level.type in ("e8m0floor", "e8m0ceil") for level in self.weight.scales):
            raise ValueError("a weight's scales are found already; they are e8m0")

    def __str__(self) -> str:
        if self in _SHORT_NAMES:
            return _SHORT_NAMES[self]
        weight = str(self.weight)
        if self.input:
            weight += f"/{self.input}"
        elif _normal_form(self.weight):
            weight = weight.partition("-")[2]
        return f"W{self.weight.bits}A{self.input.bits if self.input else 16}-{weight}"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The inverse of str(); preset names such as FP8_DYNAMIC are taken too. Raises Refused (bad-scheme)."""
        known = PRESETS.get(text) or SHORTHANDS.get(text)
        if known:
            return known
        head = re.fullmatch(r"W(\d+)A(\d+)-(.+)", text)
        if not head:
            raise _bad_scheme(text, "a scheme begins with W<bits>A<bits>-")
        weight_text, slash, input_text = head[3].partition("/")
        if not slash and re.match(_LEVEL, weight_text):
            sign = "" if "-sym" in weight_text else "u"
            weight_text = f"{sign}int{head[1]}-{weight_text}"
        try:
            scheme = cls(_parse_tensor(weight_text), _parse_tensor(input_text) if slash else None)
        except ValueError as error:
            raise _bad_scheme(text, str(error)) from error
        bits = (scheme.weight.bits, scheme.input.bits if scheme.input else 16)
        if (int(head[1]), int(head[2])) != bits:
            raise _bad_scheme(text, f"it says W{head[1]}A{head[2]}, its parts say W{bits[0]}A{bits[1]}")
        return scheme


def weight_only(element: Element, *scales: Level, zero: Zero | None = None, ordered: bool = False) -> Scheme:
    """A scheme whose activations stay in 16 bits or more."""
    return Scheme(TensorScheme(element, scales, zero, ordered))


def integer_weight(bits: int, granularity: Granularity, *, symmetric: bool, ordered: bool = False) -> TensorScheme:
    """The normal form of an affine integer weight: symmetric is signed without a zero point, asymmetric is unsigned
    with a stored one. Formats that store the same numbers otherwise are brought to it when decoded."""
    zero: Zero | None = None if symmetric else "stored"
    return TensorScheme(Int(bits, signed=symmetric), (Level(granularity),), zero, ordered)


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
    "W8A16-mxfp8": Scheme(TensorScheme(_FP8, _MX)),
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
    "NVFP4A16": SHORTHANDS["W4A16-nvfp4"],
    "MXFP4": SHORTHANDS["W4A4-mxfp4"],
    "MXFP4A16": SHORTHANDS["W4A16-mxfp4"],
    "MXFP8": SHORTHANDS["W8A8-mxfp8"],
    "MXFP8A16": SHORTHANDS["W8A16-mxfp8"],
    "MXFP6A16": Scheme(TensorScheme(Float("e2m3"), _MX)),
    "MXFP6A8": Scheme(TensorScheme(Float("e2m3"), _MX), _dynamic(_FP8, *_MX)),
    "W4A8": Scheme(integer_weight(4, Group(128), symmetric=True), _dynamic(_INT8, Level(PerToken()))),
    "W4AFP8": Scheme(integer_weight(4, Group(128), symmetric=True), _dynamic(_FP8, Level(PerToken()))),
}
"""LLM Compressor's preset names."""

_SHORT_NAMES: dict[Scheme, str] = {scheme: name for name, scheme in SHORTHANDS.items()}


def _parse_tensor(text: str) -> TensorScheme:
    words = re.split(r"-(?!\d)", text)  # a digit after the dash belongs to an exponent
    element = parse_element(words.pop(0))
    levels: tuple[Level, ...] = ()
    if words and re.match(_LEVEL, words[0]):
        levels = tuple(parse_level(level) for level in words.pop(0).split("+"))
    zero = None
    if isinstance(element, Int):
        word = words.pop(0) if words else ""
        if word not in ("sym", "asym", "zfloat"):
            raise ValueError("an integer says sym, asym or zfloat")
        zero = {"sym": None, "asym": "stored", "zfloat": "float"}[word]
    ordered, dynamic = (bool(words and words[0] == flag and words.pop(0)) for flag in ("actorder", "dyn"))
    outliers, bound = (
        float(words.pop(0).removeprefix(word)) if words and words[0].startswith(word) else None
        for word in ("outliers", "bound")
    )
    if words:
        raise ValueError(f"unknown word {words[0]!r}")
    return TensorScheme(element, levels, zero, ordered, dynamic, outliers, bound)  # type: ignore[arg-type]


def _normal_form(scheme: TensorScheme) -> bool:
    return (
        isinstance(scheme.element, Int)
        and bool(scheme.scales)
        and scheme.element.signed == (scheme.zero is None)
        and not scheme.dynamic
    )


def _bad_scheme(text: str, why: str) -> Refused:
    fix = f"Write a scheme such as W4A16-g128-sym, or a preset: {', '.join(PRESETS)}."
    return Refused(Refusal("bad-scheme", "usage", text, "this is not a scheme", why, fix))
