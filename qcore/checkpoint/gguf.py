"""A bounded reader of GGUF v2 and v3, little- and big-endian, one file or shards.

Format (ggml's docs/gguf.md): magic, u32 version, u64 tensor count, u64 field count; fields (string key, u32 type, value);
tensor headers (string name, u32 dimensions, u64 sizes from the contiguous one, u32 ggml type, u64 offset); padding to
the alignment; data, where offsets count from. A string is a u64 length and its bytes. Nothing is allocated before its
length has been compared with what is left of the file.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qcore.blocks.types import BLOCK_TYPES, BY_ID, PLAIN_TYPES, REMOVED_IDS
from qcore.checkpoint import limits
from qcore.checkpoint.pread import FileState, read_tensor_bytes, unreadable, wrong_magic
from qcore.checkpoint.source import TensorInfo
from qcore.refusal import Refused, bad_file

if TYPE_CHECKING:
    import torch

_SCALARS: dict[int, tuple[str, int]] = {
    0: ("B", 1), 1: ("b", 1), 2: ("H", 2), 3: ("h", 2), 4: ("I", 4), 5: ("i", 4), 6: ("f", 4), 7: ("?", 1),
    10: ("Q", 8), 11: ("q", 8), 12: ("d", 8),
}  # fmt: skip
"""Field types: struct's letter and bytes. 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_TORCH = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_CHUNK = 1 << 16


class GgufSource:
    """An opened GGUF checkpoint."""

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any],
        states: Mapping[Path, FileState], swapped: frozenset[Path],
    ) -> None:  # fmt: skip
        self.path, self.tensors, self.metadata = path, tensors, metadata
        self._states, self._swapped = states, swapped

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """A .gguf file; the other shards of a split one are found beside it. Raises Refused."""
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, Any] = {}
        states: dict[Path, FileState] = {}
        swapped = set()
        for file in _files(path):
            states[file] = FileState.of(file)
            try:
                with file.open("rb") as stream:
                    header = _Header(file, states[file].size, stream)
                    header.parse()
            except OSError as error:
                raise unreadable(file, error) from error
            for name, info in header.tensors.items():
                if name in tensors:
                    raise bad_file("duplicate", "two shards hold the same tensor", file=file, tensor=name,
                                   found=tensors[name].file.name, expected="each tensor in one shard")  # fmt: skip
                tensors[name] = info
            metadata = {**header.metadata, **metadata}  # the first shard's fields describe the model
            if header.order != ("<" if sys.byteorder == "little" else ">"):
                swapped.add(file)
        return cls(path, tensors, metadata, states, frozenset(swapped))

    def read(self, name: str) -> torch.Tensor:
        """Plain types in torch's dtype and the tensor's shape; block types as uint8 [rows, bytes per row]."""
        info = self.tensors[name]
        data = read_tensor_bytes(info.file, self._states[info.file], info.offset, info.nbytes)
        return self._typed(info, data, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first dimension."""
        info = self.tensors[name]
        stop = min(stop, info.shape[0])
        row = info.nbytes // info.shape[0]
        data = read_tensor_bytes(info.file, self._states[info.file], info.offset + start * row, (stop - start) * row)
        return self._typed(info, data, (stop - start, *info.shape[1:]))

    def _typed(self, info: TensorInfo, data: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        from qcore.blocks.dequantize import byteswap_blocks

        swap = info.file in self._swapped
        block = BLOCK_TYPES.get(info.dtype.lower())
        if block is not None:
            rows = data.view(-1, shape[-1] // block.elements * block.nbytes)
            return byteswap_blocks(block.name, rows) if swap else rows
        dtype: torch.dtype = getattr(torch, _TORCH[info.dtype])
        if swap:
            data = data.view(-1, dtype.itemsize).flip(1).reshape(-1)
        return data.view(dtype).reshape(shape)


def _files(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= count <= limits.SHARDS:
        raise bad_file("limit-exceeded", "the shard count is not a real one", file=path, field="name", found=count)
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise bad_file("shard-missing", f"the shard {file.name} is not there", file=path, found="no such file",
                           expected=file.name, fix=f"Download {file.name} again into the same folder.")  # fmt: skip
    return files


class _Header:
    """One file's header, parsed from a stream. `order` is struct's mark of the file's byte order."""

    def __init__(self, file: Path, size: int, stream: BinaryIO) -> None:
        self.file, self.size, self.stream = file, size, stream
        self.order = "<"
        self.at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}

    def parse(self) -> None:
        if self.stream.read(4) != b"GGUF":
            self.stream.seek(0)
            raise wrong_magic(self.file, self.stream.read(32), "GGUF")
        self.at = 4
        version = self.number("I", "version")
        if version not in (2, 3) and int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
            self.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise self.no("bad-version", "version", "this version of GGUF is not read", version, "2 or 3",
                          fix="Convert the model again with a current llama.cpp.")  # fmt: skip
        tensors, fields = self.number("Q", "tensor_count"), self.number("Q", "metadata_kv_count")
        # A tensor header takes at least 32 bytes, a field at least 13.
        self.count("tensor_count", tensors, limits.GGUF_TENSORS, 32)
        self.count("metadata_kv_count", fields, limits.GGUF_FIELDS, 13)
        for _ in range(fields):
            self.field()
        self.metadata["GGUF.version"] = version
        rows = [self.tensor() for _ in range(tensors)]
        self.place(rows)

    def no(self, code: str, field: str, reason: str, found: object, expected: object, tensor: str | None = None,
           fix: str | None = None) -> Refused:  # fmt: skip
        more = {} if fix is None else {"fix": fix}
        return bad_file(code, f"{reason} (byte {self.at})", file=self.file, tensor=tensor, field=field, found=found,
                        expected=expected, **more)  # fmt: skip

    def take(self, count: int, field: str) -> bytes:
        """The next bytes, once they are known to be there."""
        if count > self.size - self.at or self.at + count > limits.GGUF_HEADER:
            raise self.no("truncated", field, "a length points past the end of the file", count,
                          f"at most {self.size - self.at} bytes")  # fmt: skip
        data = self.stream.read(count)
        if len(data) != count:
            raise self.no("truncated", field, "the file ends here", f"{len(data)} bytes", f"{count} bytes")
        self.at += count
        return data

    def number(self, letter: str, field: str) -> int:
        value: int = struct.unpack(self.order + letter, self.take(struct.calcsize(letter), field))[0]
        return value

    def count(self, field: str, value: int, most: int, least_bytes: int) -> None:
        """Refuses a count that is not a real one or that the rest of the file cannot hold."""
        if value > most:
            raise self.no("limit-exceeded", field, "a count is larger than any real one", value, f"at most {most}")
        if value * least_bytes > self.size - self.at:
            raise self.no("truncated", field, "the file is too short for this count", value,
                          f"at most {(self.size - self.at) // least_bytes}")  # fmt: skip

    def name(self, field: str) -> str:
        length = self.number("Q", field)
        if length > limits.GGUF_NAME:
            raise self.no(
                "limit-exceeded",
                field,
                "a name is longer than any real one",
                length,
                f"at most {limits.GGUF_NAME} bytes",
            )
        data = self.take(length, field)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise self.no("bad-text", field, "a name is not UTF-8", data, "UTF-8 text") from error
        if not text or not text.isprintable():
            raise self.no("bad-text", field, "a name is not printable text", text, "a name")
        return text

    def field(self) -> None:
        key = self.name("metadata key")
        if key in self.metadata:
            raise self.no("duplicate", key, "a field stands twice", key, "each field once")
        self.metadata[key] = self.value(self.number("I", key), key, 0)

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.array(key, depth)
        if kind not in _SCALARS:
            raise self.no("bad-field", key, "the field's type is unknown", kind, "0 to 12")
        letter, size = _SCALARS[kind]
        data = self.take(size, key)
        if kind == 7 and data not in (b"\0", b"\1"):
            raise self.no("bad-field", key, "a boolean is 0 or 1", data[0], "0 or 1")
        return struct.unpack(self.order + letter, data)[0]

    def text(self, key: str) -> str:
        """Vocabularies may hold pieces of characters: bytes that are not UTF-8 survive as surrogates."""
        return self.take(self.number("Q", key), key).decode("utf-8", "surrogateescape")

    def array(self, key: str, depth: int) -> list[Any]:
        if depth >= limits.GGUF_ARRAY_DEPTH:
            raise self.no(
                "limit-exceeded", key, "arrays nest too deeply", depth + 1, f"at most {limits.GGUF_ARRAY_DEPTH}"
            )
        kind, count = self.number("I", key), self.number("Q", key)
        least = {_STRING: 8, _ARRAY: 12}.get(kind) or (_SCALARS[kind][1] if kind in _SCALARS else 0)
        if not least:
            raise self.no("bad-field", key, "the array's type is unknown", kind, "0 to 12")
        self.count(key, count, limits.GGUF_ARRAY, least)
        if kind in (_STRING, _ARRAY):
            one: Callable[[], Any] = (
                (lambda: self.text(key)) if kind == _STRING else (lambda: self.array(key, depth + 1))
            )
            return [one() for _ in range(count)]
        values: list[Any] = []
        letter, size = _SCALARS[kind]
        while len(values) < count:  # in pieces, so that no large buffer stands beside the values
            piece = min(count - len(values), _CHUNK)
            data = self.take(piece * size, key)
            if kind == 7 and data.strip(b"\0\1"):
                raise self.no("bad-field", key, "a boolean is 0 or 1", data.strip(b"\0\1")[0], "0 or 1")
            values += struct.unpack(f"{self.order}{piece}{letter}", data)
        return values

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape outermost first, offset in the data and bytes."""
        name = self.name("tensor name")
        dimensions = self.number("I", "dimensions")
        if not 1 <= dimensions <= limits.DIMENSIONS:
            raise self.no("bad-shape", "dimensions", "a tensor has one to eight dimensions", dimensions, "1 to 8", name)
        sizes = [self.number("Q", "shape") for _ in range(dimensions)]
        kind, offset = self.number("I", "type"), self.number("Q", "offset")
        elements = 1
        for size in sizes:
            elements *= size
        if elements == 0 or elements >= 1 << 63:
            raise self.no(
                "bad-shape", "shape", "the number of elements is not a real one", sizes[::-1], "1 to 2^63", name
            )
        if kind in BY_ID:
            block = BY_ID[kind]
            if sizes[0] % block.elements:
                raise self.no("bad-shape", "shape", f"rows of {block.name} are whole blocks", sizes[0],
                              f"a multiple of {block.elements}", name)  # fmt: skip
            return name, block.name.upper(), tuple(sizes[::-1]), offset, elements // block.elements * block.nbytes
        if kind in PLAIN_TYPES:
            title, width = PLAIN_TYPES[kind]
            return name, title, tuple(sizes[::-1]), offset, elements * width
        found = f"{kind} ({REMOVED_IDS[kind]}, which ggml removed)" if kind in REMOVED_IDS else kind
        raise self.no("bad-dtype", "type", "the tensor's type is unknown", found, "a ggml type", name)

    def place(self, rows: list[tuple[str, str, tuple[int, ...], int, int]]) -> None:
        """Offsets in the file, once every tensor lies inside it and none on another."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= limits.GGUF_ALIGNMENT or alignment & (alignment - 1):
            raise self.no("bad-field", "general.alignment", "the alignment is a power of two", alignment,
                          f"1 to {limits.GGUF_ALIGNMENT}")  # fmt: skip
        begin = -(-self.at // alignment) * alignment
        end, before = 0, ""
        for name, dtype, shape, offset, nbytes in sorted(rows, key=lambda row: row[3]):
            if name in self.tensors:
                raise self.no("duplicate", "tensor name", "a tensor stands twice", name, "each tensor once", name)
            if offset % alignment:
                raise self.no(
                    "bad-field", "offset", "an offset is not aligned", offset, f"a multiple of {alignment}", name
                )
            if offset < end:
                raise self.no("overlap", "offset", f"it overlaps {before}", offset, f"at least {end}", name)
            end, before = offset + nbytes, name
            if begin + end > self.size:
                raise self.no("truncated", "offset", "the tensor lies outside the file", f"ends at {begin + end}",
                              f"at most {self.size}", name)  # fmt: skip
            self.tensors[name] = TensorInfo(name, dtype, shape, self.file, begin + offset, nbytes)
        self.tensors = {row[0]: self.tensors[row[0]] for row in rows}  # in the file's own order
