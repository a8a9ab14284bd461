"""What one stored number is, and what shares a scale: the words that schemes are made of, and how each prints and parses.

element      int4 uint4 ... fp8 (e4m3fn) e4m3fnuz e4m3 e5m2 e2m1 e3m2 e2m3 e4m7 bf16 f16 nf4 fp4 gguf:q4_k
granularity  tensor channel token g128 flat64 block128 tile64x32
level        a granularity, then :<type> where the scales are not floats
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Literal, get_args

from qcore.blocks.types import BLOCK_TYPES

FloatFormat = Literal["e4m3fn", "e4m3fnuz", "e4m3", "e5m2", "e2m1", "e3m2", "e2m3", "e4m7", "bf16", "f16"]
FLOAT_BITS: dict[str, int] = {
    "e4m3fn": 8, "e4m3fnuz": 8, "e4m3": 8, "e5m2": 8, "e2m1": 4, "e3m2": 6, "e2m3": 6, "e4m7": 12, "bf16": 16, "f16": 16
}  # fmt: skip

CodebookName = Literal["nf4", "fp4"]
CODEBOOK_BITS: dict[str, int] = {"nf4": 4, "fp4": 4}

ScaleType = Literal["float", "e8m0", "e8m0floor", "e8m0ceil", "e4m3fn", "dynamic8"]
"""float: f32, f16 or bf16 as stored. e8m0: a power of two; of inputs, e8m0, e8m0floor and e8m0ceil say how it is found at
run time (qcore/kernels/minifloat.py). e4m3fn: an 8-bit float. dynamic8: an 8-bit codebook index (bitsandbytes' nested
absmax)."""


@dataclass(frozen=True)
class Int:
    """Integers of 1 to 8 bits. Signed codes below 8 bits are held as q + 2^(bits-1)."""

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"integers have 1 to 8 bits, not {self.bits}")

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


@dataclass(frozen=True)
class Float:
    """Small floating-point numbers (OCP 8-bit and microscaling formats; e4m3fnuz is AMD's). e4m3 and e4m7 are DeepSpeed's:
    every exponent is a number, so that the largest are 480 and 510."""

    format: FloatFormat

    def __post_init__(self) -> None:
        one_of("float format", self.format, FLOAT_BITS)

    @property
    def bits(self) -> int:
        return FLOAT_BITS[self.format]

    def __str__(self) -> str:
        return "fp8" if self.format == "e4m3fn" else self.format


@dataclass(frozen=True)
class Codebook:
    """Indexes into a table of float32 values that travels with the tensor."""

    name: CodebookName

    def __post_init__(self) -> None:
        one_of("codebook", self.name, CODEBOOK_BITS)

    @property
    def bits(self) -> int:
        return CODEBOOK_BITS[self.name]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Block:
    """ggml's self-contained blocks, scales and codes interleaved; `type` is a key of BLOCK_TYPES."""

    type: str

    def __post_init__(self) -> None:
        one_of("block type", self.type, BLOCK_TYPES)

    @property
    def bits(self) -> int:
        return BLOCK_TYPES[self.type].bits

    def __str__(self) -> str:
        return f"gguf:{self.type}"


Element = Int | Float | Codebook | Block


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: [1, 1]."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel: [N, 1]."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of activations."""

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class Group:
    """One scale for each run of `size` input channels of a row: [N, ceil(K / size)]."""

    size: int

    def __post_init__(self) -> None:
        _positive(self.size)

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True)
class FlatGroup:
    """One scale for each run of `size` elements of the flattened weight, crossing row ends: [1, ceil(N K / size)]."""

    size: int

    def __post_init__(self) -> None:
        _positive(self.size)

    def __str__(self) -> str:
        return f"flat{self.size}"


@dataclass(frozen=True)
class Tile:
    """One scale for each rectangle: [ceil(N / rows), ceil(K / cols)]; the last ones may be ragged."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        _positive(self.rows)
        _positive(self.cols)

    def __str__(self) -> str:
        return f"block{self.rows}" if self.rows == self.cols else f"tile{self.rows}x{self.cols}"


Granularity = PerTensor | PerChannel | PerToken | Group | FlatGroup | Tile


@dataclass(frozen=True)
class Level:
    """One level of scales."""

    granularity: Granularity
    type: ScaleType = "float"

    def __post_init__(self) -> None:
        one_of("scale type", self.type, get_args(ScaleType))

    def __str__(self) -> str:
        return f"{self.granularity}" if self.type == "float" else f"{self.granularity}:{self.type}"


_GRANULARITIES: tuple[tuple[str, Callable[..., Granularity]], ...] = (
    (r"tensor", PerTensor),
    (r"channel", PerChannel),
    (r"token", PerToken),
    (r"g(\d+)", Group),
    (r"flat(\d+)", FlatGroup),
    (r"block(\d+)", lambda side: Tile(side, side)),
    (r"tile(\d+)x(\d+)", Tile),
)


def parse_element(text: str) -> Element:
    """The inverse of str(). Raises ValueError."""
    if integer := re.fullmatch(r"(u?)int(\d)", text):
        return Int(int(integer[2]), signed=not integer[1])
    if text.startswith("gguf:"):
        return Block(text[5:])
    if text in CODEBOOK_BITS:
        return Codebook(text)  # type: ignore[arg-type]
    if text == "fp8" or (text in FLOAT_BITS and text != "e4m3fn"):
        return Float("e4m3fn" if text == "fp8" else text)  # type: ignore[arg-type]
    raise ValueError(f"unknown element {text!r}")


def parse_level(text: str) -> Level:
    """The inverse of str(). Raises ValueError."""
    name, colon, scale_type = text.partition(":")
    for pattern, make in _GRANULARITIES:
        if match := re.fullmatch(pattern, name):
            granularity = make(*(int(size) for size in match.groups()))
            return Level(granularity, scale_type if colon else "float")  # type: ignore[arg-type]
    raise ValueError(f"unknown granularity {name!r}")


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


def in_rows(group: FlatGroup, columns: int) -> Granularity:
    """The same groups counted along rows, which more kernels take, where they end with the rows."""
    return group if columns % group.size else Group(group.size)


def one_of(what: str, value: object, known: Container[object]) -> None:
    """Raises ValueError where `value` is not among the known ones."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}")


def _positive(size: int) -> None:
    if size < 1:
        raise ValueError(f"a group or tile has at least one element, not {size}")
