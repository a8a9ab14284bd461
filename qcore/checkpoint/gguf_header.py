"""One GGUF file's header: walked and checked from end to end first, turned into Python values only then.

Format (ggml's docs/gguf.md): magic, u32 version, u64 tensor count, u64 field count; fields (string key, u32 type, value);
tensor headers (string name, u32 dimensions, u64 sizes from the contiguous one, u32 ggml type, u64 offset); padding to
the alignment; data, where offsets count from. A string is a u64 length and its bytes, an array a u32 type, a u64 count
and its values. Every length is compared with what is left of the file before it is used.
"""

from __future__ import annotations

import codecs
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from qcore.blocks.types import BY_ID, PLAIN_TYPES, REMOVED_IDS
from qcore.checkpoint import limits
from qcore.checkpoint.pread import wrong_magic
from qcore.checkpoint.source import TensorInfo
from qcore.refusal import Refused, bad_file

_SCALARS: dict[int, tuple[str, int]] = {
    0: ("B", 1), 1: ("b", 1), 2: ("H", 2), 3: ("h", 2), 4: ("I", 4), 5: ("i", 4), 6: ("f", 4), 7: ("?", 1),
    10: ("Q", 8), 11: ("q", 8), 12: ("d", 8),
}  # fmt: skip
"""Field types: struct's letter and bytes."""
_NUMBER, _BOOL, _STRING, _ARRAY = 0, 7, 8, 9
_LEAST = {**{kind: size for kind, (_, size) in _SCALARS.items()}, _STRING: 8, _ARRAY: 12}
"""Bytes that a value of each type takes at least."""
_LEAST_FIELD, _LEAST_TENSOR = 14, 33
"""Bytes of the shortest metadata field and tensor header."""
_WINDOW = 1 << 18
"""Bytes read at once: few system calls, little memory."""


class Header:
    """The header of the file behind an open descriptor.

    metadata: numbers, texts and lists of them, by key, and the container's own version as `GGUF.version`. tensors: in the
    file's order. big_endian: the file's byte order, which only its version tells. Raises Refused where anything is amiss.
    """

    def __init__(self, file: Path, descriptor: int, size: int) -> None:
        self.file, self.size = file, size
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._descriptor, self._at = descriptor, 0
        self._window, self._window_at = b"", 0
        self._room = {_NUMBER: limits.GGUF_NUMBERS, _STRING: limits.GGUF_TEXTS, _ARRAY: limits.GGUF_ARRAYS}
        start = self._peek()
        if not start.startswith(b"GGUF"):
            raise wrong_magic(self.file, start[:40], "GGUF")
        self._at = 4
        self.big_endian, version = self._version()
        self._order = ">" if self.big_endian else "<"
        self._length = struct.Struct(f"{self._order}Q")
        self._parse()
        self.metadata["GGUF.version"] = version

    def _version(self) -> tuple[bool, int]:
        """Whether the file is big-endian, and its version."""
        number = self._take(4, "version")
        little, big = int.from_bytes(number, "little"), int.from_bytes(number, "big")
        if little in (2, 3):
            return False, little
        if big in (2, 3):
            return True, big
        raise self._no("bad-version", "version", "this version of GGUF is not read", little, "2 or 3",
                       fix="Convert the model again with a current llama.cpp.")  # fmt: skip

    def _parse(self) -> None:
        tensors, fields = self._number("Q", "tensor_count"), self._number("Q", "metadata_kv_count")
        self._fits("tensor_count", tensors, limits.GGUF_TENSORS, _LEAST_TENSOR)
        self._fits("metadata_kv_count", fields, limits.GGUF_FIELDS, _LEAST_FIELD)
        later = [self._field() for _ in range(fields)]
        self._place([self._tensor() for _ in range(tensors)])
        for key, kind, self._at in later:
            if kind not in _SCALARS:
                self.metadata[key] = self._array(key) if kind == _ARRAY else self._text(key)

    def _field(self) -> tuple[str, int, int]:
        """Key, type and place of the next field. Numbers are read, texts and arrays only checked."""
        key = self._name("metadata key", limits.GGUF_KEY)
        if key in self.metadata:
            raise self._no("duplicate", key, "a field stands twice", key, "each field once")
        kind = self._number("I", key)
        at = self._at
        self.metadata[key] = None
        if kind == _STRING:
            self._skip_text(key)
        elif kind == _ARRAY:
            self._skip_array(key)
        elif kind in _SCALARS:
            self.metadata[key] = self._scalar(kind, key)
        else:
            raise self._no("bad-field", key, "the field's type is unknown", kind, "0 to 12")
        return key, kind, at

    # --- Bytes ---

    def _no(
        self,
        code: str,
        field: str,
        reason: str,
        found: object,
        expected: object,
        *,
        tensor: str | None = None,
        **fix: str,
    ) -> Refused:
        return bad_file(code, f"{reason} (byte {self._at})", file=self.file, tensor=tensor, field=field, found=found,
                        expected=expected, **fix)  # fmt: skip

    def _peek(self) -> bytes:
        """The next bytes: as many as a window holds, or the file has."""
        if self._at > limits.GGUF_HEADER:
            raise self._no("limit-exceeded", "header", "the header is larger than any real one", self._at,
                           f"at most {limits.GGUF_HEADER} bytes")  # fmt: skip
        self._window, self._window_at = os.pread(self._descriptor, _WINDOW, self._at), self._at
        return self._window

    def _take(self, count: int, field: str) -> bytes:
        """The next bytes; never more than a window's."""
        start = self._at - self._window_at
        if not 0 <= start <= len(self._window) - count:
            self._peek()
            start = 0
        data = self._window[start : start + count]
        if len(data) < count:
            raise self._no("truncated", field, "the file ends here", f"{len(data)} bytes", f"{count} bytes")
        self._at += count
        return data

    def _pieces(self, count: int, field: str) -> Iterator[bytes]:
        """The next bytes, a window's at a time."""
        while count:
            piece = self._take(min(count, _WINDOW), field)
            count -= len(piece)
            yield piece

    def _pass(self, count: int, field: str) -> None:
        """Goes on by as many bytes, if they are there."""
        left = self.size - self._at
        if count > left:
            raise self._no(
                "truncated", field, "a length points past the end of the file", count, f"at most {left} bytes"
            )
        self._at += count

    def _number(self, letter: str, field: str) -> int:
        value: int = struct.unpack(self._order + letter, self._take(4 if letter == "I" else 8, field))[0]
        return value

    def _fits(self, field: str, count: int, most: int, least_bytes: int) -> None:
        """Refuses a count that is not a real one or that the rest of the file cannot hold."""
        if count > most:
            raise self._no("limit-exceeded", field, "a count is larger than any real one", count, f"at most {most}")
        room = (self.size - self._at) // least_bytes
        if count > room:
            raise self._no("truncated", field, "the file is too short for this count", count, f"at most {room}")

    def _name(self, field: str, most: int) -> str:
        length = self._number("Q", field)
        self._fits(field, length, most, 1)
        data = self._take(length, field)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise self._no("bad-text", field, "a name is not UTF-8", data, "UTF-8 text") from error
        if not text.isprintable() or not text:
            raise self._no("bad-text", field, "a name is not printable text", ascii(text), "a name")
        return text

    # --- Metadata: walked over first, read when the whole header is known to be right ---

    def _scalar(self, kind: int, key: str) -> Any:
        letter, size = _SCALARS[kind]
        data = self._take(size, key)
        if kind == _BOOL:
            self._check_booleans(data, key)
        return struct.unpack(self._order + letter, data)[0]

    def _check_booleans(self, data: bytes, key: str) -> None:
        wrong = data.translate(None, b"\0\1")
        if wrong:
            raise self._no("bad-field", key, "a boolean is 0 or 1", wrong[0], "0 or 1")

    def _skip_text(self, key: str) -> None:
        length = self._number("Q", key)
        self._fits(key, length, limits.GGUF_STRING, 1)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for piece in self._pieces(length, key):
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self._no("bad-text", key, "a text is not UTF-8", error.object[error.start : error.end], "UTF-8 text") from error  # fmt: skip

    def _skip_array(self, key: str, depth: int = 1) -> None:
        if depth > limits.GGUF_ARRAY_DEPTH:
            raise self._no("limit-exceeded", key, "arrays nest too deeply", depth, f"at most {limits.GGUF_ARRAY_DEPTH}")
        kind, count = self._number("I", key), self._number("Q", key)
        if kind not in _LEAST:
            raise self._no("bad-field", key, "the array's type is unknown", kind, "0 to 12")
        group = kind if kind in self._room else _NUMBER
        self._fits(key, count, self._room[group], _LEAST[kind])
        self._room[group] -= count
        if kind == _ARRAY:
            for _ in range(count):
                self._skip_array(key, depth + 1)
        elif kind == _STRING:
            self._skip_strings(count, key)
        elif kind == _BOOL:
            for piece in self._pieces(count, key):
                self._check_booleans(piece, key)
        else:
            self._pass(count * _LEAST[kind], key)

    def _skip_strings(self, count: int, key: str) -> None:
        length = self._length.unpack_from
        while count:
            window, at = self._peek(), 0
            if len(window) < 8:
                self._take(8, key)
            try:
                for _ in range(count):
                    at += 8 + length(window, at)[0]
                    count -= 1
            except (struct.error, OverflowError):  # the next length is not in the window: cheaper than to ask each time
                pass
            self._pass(at, key)

    def _text(self, key: str) -> str:
        return b"".join(self._pieces(self._number("Q", key), key)).decode("utf-8", "surrogateescape")

    def _array(self, key: str) -> list[Any]:
        kind, count = self._number("I", key), self._number("Q", key)
        if kind == _ARRAY:
            return [self._array(key) for _ in range(count)]
        if kind == _STRING:
            return self._strings(count, key)
        letter, size = _SCALARS[kind]
        values: list[Any] = []
        for piece in self._pieces(count * size, key):
            values += struct.unpack(f"{self._order}{len(piece) // size}{letter}", piece)
        return values

    def _strings(self, count: int, key: str) -> list[str]:
        """Tokens may be pieces of characters: bytes that are not UTF-8 survive as surrogates (PEP 383)."""
        length, found = self._length.unpack_from, list[str]()
        while len(found) < count:
            window, at = self._peek(), 0
            last = len(window) - 8
            while len(found) < count and at <= last:
                end = at + 8 + length(window, at)[0]
                if end > len(window):
                    break
                found.append(window[at + 8 : end].decode("utf-8", "surrogateescape"))
                at = end
            self._at += at
            if not at:  # it is longer than a window
                found.append(self._text(key))
        return found

    # --- Tensors ---

    def _tensor(self) -> TensorInfo:
        """The next tensor's header, with its offset as stored: counted from the beginning of the data."""
        name = self._name("tensor name", limits.GGUF_NAME)
        dimensions = self._number("I", "dimensions")
        if not 1 <= dimensions <= limits.GGUF_DIMENSIONS:
            raise self._no("bad-shape", "dimensions", "a tensor has a few dimensions", dimensions,
                           f"1 to {limits.GGUF_DIMENSIONS}", tensor=name)  # fmt: skip
        layout = f"{self._order}{dimensions}QIQ"
        *sizes, kind, offset = struct.unpack(layout, self._take(struct.calcsize(layout), "tensor header"))
        shape = tuple(reversed(sizes))
        elements = prod(shape)
        if not 0 < elements < 1 << 63:
            raise self._no("bad-shape", "shape", "the number of elements is not a real one", list(shape), "1 to 2^63",
                           tensor=name)  # fmt: skip
        if kind in PLAIN_TYPES:
            dtype, width = PLAIN_TYPES[kind]
            return TensorInfo(name, dtype, shape, self.file, offset, elements * width)
        if kind not in BY_ID:
            found = f"{kind} ({REMOVED_IDS[kind]}, which ggml removed)" if kind in REMOVED_IDS else kind
            raise self._no("bad-dtype", "type", "the tensor's type is unknown", found, "a type that ggml stores",
                           tensor=name)  # fmt: skip
        block = BY_ID[kind]
        if shape[-1] % block.elements:
            raise self._no("bad-shape", "shape", f"rows of {block.name.upper()} are whole blocks", shape[-1],
                           f"a multiple of {block.elements}", tensor=name)  # fmt: skip
        nbytes = elements // block.elements * block.nbytes
        return TensorInfo(name, block.name.upper(), shape, self.file, offset, nbytes)

    def _place(self, found: list[TensorInfo]) -> None:
        """Turns offsets into places in the file, once every tensor lies inside it and next to the one before."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= limits.GGUF_ALIGNMENT or alignment & (alignment - 1):
            raise self._no("bad-field", "general.alignment", "the alignment is a power of two", alignment,
                           f"1 to {limits.GGUF_ALIGNMENT}")  # fmt: skip
        begin = -(-self._at // alignment) * alignment
        for info in found:
            if info.name in self.tensors:
                raise self._no("duplicate", "tensor name", "a tensor stands twice", info.name, "each tensor once",
                               tensor=info.name)  # fmt: skip
            self.tensors[info.name] = replace(info, offset=begin + info.offset)
        end = begin
        for info in sorted(self.tensors.values(), key=lambda info: info.offset):
            self._check_place(info, begin, end, alignment)
            end = info.offset + info.nbytes

    def _check_place(self, info: TensorInfo, begin: int, end: int, alignment: int) -> None:
        """One tensor, where those before it end at `end`. Bytes after the last one are allowed, as ggml allows them."""
        offset = info.offset - begin
        if offset % alignment:
            wrong = "bad-field", "an offset is not aligned", f"a multiple of {alignment}"
        elif info.offset < end:
            wrong = "overlap", "two tensors claim the same bytes", f"at least {end - begin}"
        elif info.offset + info.nbytes > self.size:
            wrong = "truncated", "the tensor lies outside the file", f"at most {self.size - begin - info.nbytes}"
        elif info.offset - end >= alignment:
            wrong = "hole", "bytes before it belong to no tensor", f"at most {end - begin + alignment - 1}"
        else:
            return
        code, reason, expected = wrong
        raise self._no(code, "offset", reason, offset, expected, tensor=info.name)
