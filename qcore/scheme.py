"""What the numbers of a quantized layer mean: data types, granularity and symmetry, and nothing else.

How a checkpoint was made (GPTQ, AWQ), how it is packed on disk and which kernel likes it stay out, so that two formats
with the same numbers have the same `Scheme` and share kernels. A float scale's own width (f32, f16, bf16) is a property
of the tensor that holds it, not of the scheme; scales that are quantized themselves are part of it.

Schemes print as `W4A16-g128-sym` and parse back to an equal value; `qcore.notation` defines the notation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qcore.blocks.types import BLOCK_TYPES

FloatFormat = Literal["e4m3fn", "e4m3fnuz", "e5m2", "e2m1", "e3m2", "e2m3", "bf16", "f16"]
FLOAT_BITS: dict[str, int] = {
    "e4m3fn": 8, "e4m3fnuz": 8, "e5m2": 8, "e2m1": 4, "e3m2": 6, "e2m3": 6, "bf16": 16, "f16": 16
}  # fmt: skip

CodebookName = Literal["nf4", "fp4"]
CODEBOOK_BITS: dict[str, int] = {"nf4": 4, "fp4": 4}

ScaleType = Literal["float", "e8m0", "e4m3fn", "dynamic8"]
"""float: f32, f16 or bf16 as stored. e8m0: a power of two. e4m3fn: an 8-bit float. dynamic8: an 8-bit codebook index
(bitsandbytes' nested absmax)."""

Zero = Literal["stored", "float"]
"""stored: an integer code z, w = (q - z) * s. float: a float z, w = q * s + z."""


@dataclass(frozen=True)
class Int:
    """Integers of 1 to 8 bits. Signed codes below 8 bits are held as q + 2^(bits-1)."""

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"integers have 1 to 8 bits, not {self.bits}")


@dataclass(frozen=True)
class Float:
    """Small floating-point numbers (OCP 8-bit and microscaling formats; e4m3fnuz is AMD's)."""

    format: FloatFormat

    def __post_init__(self) -> None:
        _one_of("float format", self.format, FLOAT_BITS)

    @property
    def bits(self) -> int:
        return FLOAT_BITS[self.format]


@dataclass(frozen=True)
class Codebook:
    """Indexes into a table of float32 values that travels with the tensor."""

    name: CodebookName

    def __post_init__(self) -> None:
        _one_of("codebook", self.name, CODEBOOK_BITS)

    @property
    def bits(self) -> int:
        return CODEBOOK_BITS[self.name]


@dataclass(frozen=True)
class Block:
    """ggml's self-contained blocks, scales and codes interleaved; `type` is a key of BLOCK_TYPES."""

    type: str

    def __post_init__(self) -> None:
        _one_of("block type", self.type, BLOCK_TYPES)

    @property
    def bits(self) -> int:
        return BLOCK_TYPES[self.type].bits


Element = Int | Float | Codebook | Block


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: [1, 1]."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel: [N, 1]."""


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of activations."""


@dataclass(frozen=True)
class Group:
    """One scale for each run of `size` input channels of a row: [N, ceil(K / size)]."""

    size: int

    def __post_init__(self) -> None:
        _positive(self.size)


@dataclass(frozen=True)
class FlatGroup:
    """One scale for each run of `size` elements of the flattened weight, crossing row ends: [1, ceil(N K / size)]."""

    size: int

    def __post_init__(self) -> None:
        _positive(self.size)


@dataclass(frozen=True)
class Tile:
    """One scale for each rectangle: [ceil(N / rows), ceil(K / cols)]; the last ones may be ragged."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        _positive(self.rows)
        _positive(self.cols)


Granularity = PerTensor | PerChannel | PerToken | Group | FlatGroup | Tile


@dataclass(frozen=True)
class Level:
    """One level of scales."""

    granularity: Granularity
    type: ScaleType = "float"

    def __post_init__(self) -> None:
        _one_of("scale type", self.type, get_args(ScaleType))


@dataclass(frozen=True)
class TensorScheme:
    """One quantized tensor: a weight, a layer's input, or a kv cache.

    scales: from the finest level to the coarsest; their product is the scale. Empty for Block and for plain floats.
    ordered: the group of column k is index[k] (act-order), not k // size.
    dynamic: scales are computed at run time (inputs and kv caches only).
    outliers: inputs only; columns with a value beyond this magnitude stay in 16 bits (LLM.int8).
    """

    element: Element
    scales: tuple[Level, ...] = ()
    zero: Zero | None = None
    ordered: bool = False
    dynamic: bool = False
    outliers: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.element, Block) and (self.scales or self.zero or self.ordered):
            raise ValueError("a block type holds its scales and zero points inside")
        if self.zero is not None:
            _one_of("zero", self.zero, get_args(Zero))
            if not isinstance(self.element, Int):
                raise ValueError("only integers have zero points")
        if self.ordered and not any(isinstance(level.granularity, Group) for level in self.scales):
            raise ValueError("act-order needs groups")
        if self.outliers is not None and not self.outliers > 0:
            raise ValueError("the outlier threshold is a positive magnitude")

    @property
    def bits(self) -> int:
        """Bits of one stored code, scales not counted."""
        return self.element.bits

    @property
    def granularity(self) -> Granularity | None:
        """That of the finest level of scales; None where there is none."""
        return self.scales[0].granularity if self.scales else None

    def __str__(self) -> str:
        from qcore.notation import format_tensor_scheme

        return format_tensor_scheme(self)

    @classmethod
    def parse(cls, text: str) -> TensorScheme:
        """The inverse of str(). Raises Refused (bad-scheme)."""
        from qcore.notation import parse_tensor_scheme

        return parse_tensor_scheme(text)


@dataclass(frozen=True)
class Scheme:
    """One linear layer: its weight and, where activations are quantized too, its input."""

    weight: TensorScheme
    input: TensorScheme | None = None

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.outliers is not None:
            raise ValueError("a weight's scales are stored, and it has no outliers")

    def __str__(self) -> str:
        from qcore.notation import format_scheme

        return format_scheme(self)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The inverse of str(); preset names such as FP8_DYNAMIC are taken too. Raises Refused (bad-scheme)."""
        from qcore.notation import parse_scheme

        return parse_scheme(text)


def weight_only(element: Element, *scales: Level, zero: Zero | None = None, ordered: bool = False) -> Scheme:
    """A scheme whose activations stay in 16 bits or more."""
    return Scheme(TensorScheme(element, scales, zero, ordered))


def integer_weight(bits: int, granularity: Granularity, *, symmetric: bool, ordered: bool = False) -> TensorScheme:
    """The normal form of an affine integer weight: symmetric is signed without a zero point, asymmetric is unsigned
    with a stored one. Formats that store the same numbers otherwise are brought to it when decoded."""
    zero: Zero | None = None if symmetric else "stored"
    return TensorScheme(Int(bits, signed=symmetric), (Level(granularity),), zero, ordered)


def scale_shape(granularity: Granularity, rows: int, columns: int) -> tuple[int, int]:
    """Shape of one level's scales for a weight [rows, columns]; ragged last groups and tiles count as whole ones."""
    if isinstance(granularity, Group):
        return rows, -(-columns // granularity.size)
    if isinstance(granularity, Tile):
        return -(-rows // granularity.rows), -(-columns // granularity.cols)
    if isinstance(granularity, FlatGroup):
        return 1, -(-rows * columns // granularity.size)
    if isinstance(granularity, PerChannel):
        return rows, 1
    if isinstance(granularity, PerTensor):
        return 1, 1
    raise ValueError("weights have no scales per token")


def _one_of(what: str, value: object, known: object) -> None:
    if value not in known:  # type: ignore[operator]
        raise ValueError(f"unknown {what} {value!r}")


def _positive(size: int) -> None:
    if size < 1:
        raise ValueError(f"a group or tile has at least one element, not {size}")
