"""Writes GGUF v3 files, little-endian: a header of what is known beforehand, then one tensor after the other.

Format: as `gguf_header` tells. Nothing of a tensor is asked for before its turn, so that one is in memory at a time.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from qcore.blocks.types import BLOCK_TYPES, PLAIN_TYPES

if TYPE_CHECKING:
    import torch

_SCALARS = {
    "uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I"), "int32": (5, "i"),
    "float32": (6, "f"), "bool": (7, "?"), "uint64": (10, "Q"), "int64": (11, "q"), "float64": (12, "d"),
}  # fmt: skip
"""Field types: GGUF's number and struct's letter."""
_STRING, _ARRAY = 8, 9
_KINDS = {
    "split.no": "uint16",
    "split.count": "uint16",
    "split.tensors_count": "int32",
    "tokenizer.ggml.precompiled_charsmap": "uint8",
}
"""Fields whose type llama.cpp insists on, where it is not the one that the Python value tells."""
_READERS_OWN = "GGUF.version"
"""What the reader adds to the fields: it tells of the file, and is none of them."""
_LONGEST_NAME = 63
"""Bytes of a tensor's name that llama.cpp loads: GGML_MAX_NAME counts the closing zero."""
_MOST_DIMENSIONS = 4

# ggml's ids, with elements and bytes of a block (a plain type's block is one value).
_TYPES = {block.name: (block.id, block.elements, block.nbytes) for block in BLOCK_TYPES.values()}
_TYPES |= {name.lower(): (number, 1, size) for number, (name, size) in PLAIN_TYPES.items()}


class Typed(NamedTuple):
    """A metadata value of a given type: "uint8" to "float64", "bool" or "string"; a list is an array of that type."""

    kind: str
    value: Any


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to be written. dtype: ggml's type name in either case. shape: outermost dimension first, in elements.

    pieces: gives the contents when they are asked for, as torch tensors whose bytes follow each other: blocks as uint8,
    plain types in their own dtype.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        _, elements, size = _TYPES[self.dtype.lower()]
        return prod(self.shape) // elements * size


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[GgufTensor]) -> None:
    """Writes the file at `path`, over whatever is there; an error leaves a part of it behind.

    metadata: values by key, `Typed` or plain. A plain int is a uint32 where it fits (in lists an int32), a float a
    float32, as llama.cpp has it nearly everywhere. `general.alignment` is obeyed. Raises ValueError for what GGUF
    cannot hold and where a tensor's pieces do not add up to its shape; OSError.
    """
    tensors = tuple(tensors)
    fields = {key: _typed(key, value) for key, value in metadata.items() if key != _READERS_OWN}
    alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two from 8 on, not {alignment!r}")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    header += (part for key, value in fields.items() for part in (_text(key), _field(key, value)))
    offset = 0
    for tensor in tensors:
        header.append(_tensor_header(tensor, offset))
        offset += -(-tensor.nbytes // alignment) * alignment
    with path.open("wb") as file:
        file.writelines(header)
        _pad(file, alignment)
        for tensor in tensors:
            _write(file, tensor)
            _pad(file, alignment)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _write(file: BinaryIO, tensor: GgufTensor) -> None:
    import torch

    written = 0
    for piece in tensor.pieces():
        data = piece.detach().cpu().contiguous().flatten()
        size = data.element_size()
        data = data.view(torch.uint8)
        if sys.byteorder == "big" and size > 1:
            data = data.view(-1, size).flip(1).flatten()
        written += data.numel()
        if written <= tensor.nbytes:
            file.write(data.numpy().data)
    if written != tensor.nbytes:
        raise ValueError(
            f"{tensor.name} has {written} bytes; {tensor.dtype} {list(tensor.shape)} takes {tensor.nbytes}"
        )


def _tensor_header(tensor: GgufTensor, offset: int) -> bytes:
    if tensor.dtype.lower() not in _TYPES:
        raise ValueError(f"{tensor.name}: unknown type {tensor.dtype!r}")
    number, elements, _ = _TYPES[tensor.dtype.lower()]
    if not 1 <= len(tensor.shape) <= _MOST_DIMENSIONS or min(tensor.shape) < 1:
        raise ValueError(f"{tensor.name}: GGUF holds tensors of one to four dimensions, not {list(tensor.shape)}")
    if tensor.shape[-1] % elements:
        raise ValueError(f"{tensor.name}: rows of {tensor.shape[-1]} are not whole {tensor.dtype} blocks of {elements}")
    if not 0 < len(tensor.name.encode()) <= _LONGEST_NAME:
        raise ValueError(f"{tensor.name!r}: a name has 1 to {_LONGEST_NAME} bytes")
    layout = f"<I{len(tensor.shape)}QIQ"
    return _text(tensor.name) + struct.pack(layout, len(tensor.shape), *reversed(tensor.shape), number, offset)


# --- Metadata ---


def _typed(key: str, value: Any) -> Typed:
    """The value with its type: its own, the one that llama.cpp insists on, or the one that fits."""
    if isinstance(value, Typed):
        return value
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values: Sequence[Any] = value if several else (value,)
    if key in _KINDS:
        return Typed(_KINDS[key], value)
    kinds = {type(one) for one in values}
    if kinds == {str}:
        return Typed("string", value)
    if kinds == {bool}:
        return Typed("bool", value)
    if kinds == {int}:
        return Typed(_integer_kind(min(values), max(values), "int32" if several else "uint32"), value)
    if kinds and kinds <= {float, int}:
        return Typed("float32", value)
    raise ValueError(f"{key}: GGUF has no type for {value!r}; give one with Typed")


def _integer_kind(least: int, most: int, preferred: str) -> str:
    """The preferred type if it holds the numbers, or the first that does."""
    for kind in (preferred, "uint32", "int32", "uint64", "int64"):
        bits, signed = int(kind.lstrip("uint")), kind[0] == "i"
        if -(signed << (bits - 1)) <= least and most < 1 << (bits - signed):
            return kind
    raise ValueError(f"integers from {least} to {most} fit no type of GGUF")


def _field(key: str, typed: Typed) -> bytes:
    kind, value = typed
    if kind != "string" and kind not in _SCALARS:
        raise ValueError(f"{key}: unknown type {kind!r}: string, {', '.join(_SCALARS)}")
    number = _STRING if kind == "string" else _SCALARS[kind][0]
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = value if several else (value,)
    start = struct.pack("<IIQ", _ARRAY, number, len(values)) if several else struct.pack("<I", number)
    try:
        if kind == "string":
            return start + b"".join(map(_text, values))
        return start + struct.pack(f"<{len(values)}{_SCALARS[kind][1]}", *values)
    except (struct.error, OverflowError, AttributeError) as error:
        raise ValueError(f"{key}: not of type {kind}: {error}") from error


def _text(text: str) -> bytes:
    """Tokens that are pieces of characters come as the reader gives them: with surrogates (PEP 383)."""
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
