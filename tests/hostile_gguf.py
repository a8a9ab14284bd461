"""Hostile GGUF files, made field by field: bytes and the code that each must be refused with."""

from __future__ import annotations

import struct
from collections.abc import Iterator

U64 = (1 << 64) - 1


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return pair("k", 9, struct.pack("<IQ", kind, count) + values)


def tensor(
    name: str | bytes = "a.weight",
    shape: tuple[int, ...] = (32, 2),
    kind: int = 0,
    offset: int = 0,
    dims: int | None = None,
) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(shape) if dims is None else dims)
        + b"".join(struct.pack("<Q", size) for size in shape)
        + struct.pack("<IQ", kind, offset)
    )


ARCH = pair("general.architecture", 8, string("llama"))


def gguf(
    fields: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 4096,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    field_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    fields = [ARCH] if fields is None else fields
    tensors = [tensor()] if tensors is None else tensors
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(fields) if field_count is None else field_count,
    )
    body = head + b"".join(fields) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + b"\0" * data


def gguf_cases() -> Iterator[tuple[str, bytes, str]]:
    good = gguf()
    yield "empty", b"", "bad-magic"
    yield "three bytes", b"GGU", "bad-magic"
    yield "text", b"hello, this is no model\n" * 10, "bad-magic"
    yield "lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "bad-magic"
    yield "web page", b"<!DOCTYPE html><html></html>", "bad-magic"
    yield "zip", b"PK\x03\x04" + b"\0" * 40, "bad-magic"
    yield "pickle", b"\x80\x02}q\x00." + b"\0" * 40, "bad-magic"
    for version in (0, 1, 4, 99, 0xFFFFFFFF, 0x01000000, 0x04000000):
        yield f"version {version}", gguf(version=version), "bad-version"
    for cut in (5, 8, 15, 20, 23):
        yield f"cut in the preamble at {cut}", good[:cut], "truncated"
    for count in (1 << 16, 1000, 100):
        yield f"{count} tensors in a small file", gguf(tensor_count=count, data=0), "truncated"
    for count in (U64, 1 << 63, 1 << 40, 1 << 20):
        yield f"{count} tensors", gguf(tensor_count=count), "limit-exceeded"
        yield f"{count} fields", gguf(field_count=count), "limit-exceeded"
    yield "more fields than bytes", gguf(field_count=16000), "truncated"
    yield "tensor name of 65", gguf(tensors=[tensor("n" * 65)]), "limit-exceeded"
    for length in (U64, 1 << 63, 1 << 40, 2000):
        yield f"key of {length}", gguf([string("k", length)]), "limit-exceeded"
        yield f"tensor name of {length}", gguf(tensors=[string("k", length)]), "limit-exceeded"
    for length in (U64, 1 << 63, 1 << 40, 1 << 20):
        code = "truncated" if length == 1 << 20 else "limit-exceeded"
        yield f"string of {length}", gguf([pair("k", 8, string("v", length))]), code
        yield f"string of {length} in an array", gguf([array(8, 1, string("v", length))]), "truncated"
    for count in (U64, 1 << 63, 1 << 40, 1 << 23):
        for kind in (0, 4, 8, 9, 12):
            yield f"array of {count} of type {kind}", gguf([array(kind, count)]), "limit-exceeded"
    for kind in (0, 4, 8, 12):
        yield f"long array of type {kind}", gguf([array(kind, 1 << 21)]), "truncated"
    for kind in (13, 255, 0xFFFFFFFF):
        yield f"field type {kind}", gguf([pair("k", kind, b"\0" * 8)]), "bad-field"
        yield f"array type {kind}", gguf([array(kind, 1)]), "bad-field"
    nested = struct.pack("<IQ", 0, 0)
    for _ in range(1000):
        nested = struct.pack("<IQ", 9, 1) + nested
    yield "nested arrays", gguf([pair("k", 9, nested)]), "limit-exceeded"
    yield "boolean of 2", gguf([pair("k", 7, b"\2")]), "bad-field"
    yield "boolean of 7 in an array", gguf([array(7, 3, b"\0\7\1")]), "bad-field"
    yield "text not UTF-8", gguf([pair("k", 8, string(b"\xff"))]), "bad-text"
    yield "text ends within a character", gguf([pair("k", 8, string(b"\xe6\x97"))]), "bad-text"
    yield "key not UTF-8", gguf([pair(b"\xff\xfe", 0, b"\0")]), "bad-text"
    yield "empty key", gguf([pair("", 0, b"\0")]), "bad-text"
    yield "key with a NUL", gguf([pair("a\0b", 0, b"\0")]), "bad-text"
    yield "key twice", gguf([pair("k", 0, b"\0"), pair("k", 0, b"\1")]), "duplicate"
    yield "tensor name not UTF-8", gguf(tensors=[tensor(b"\xc3\x28")]), "bad-text"
    yield "empty tensor name", gguf(tensors=[tensor("")]), "bad-text"
    yield "tensor twice", gguf(tensors=[tensor(), tensor(offset=256)]), "duplicate"
    for dims in (0, 5, 9, 1 << 20, 0xFFFFFFFF):
        yield f"{dims} dimensions", gguf(tensors=[tensor(dims=dims)]), "bad-shape"
    for shape in ((0,), (32, 0), (1 << 40, 1 << 40), (1 << 63,), (U64,), (1 << 32, 1 << 31)):
        yield f"shape {shape}", gguf(tensors=[tensor(shape=shape)]), "bad-shape"
    for kind in (4, 5, 9, 31, 33, 36, 43, 1000, 0xFFFFFFFF):
        yield f"tensor type {kind}", gguf(tensors=[tensor(kind=kind)]), "bad-dtype"
    for kind, size in ((2, 31), (12, 255), (8, 33), (16, 128), (40, 32), (41, 64)):
        yield f"partial block of type {kind}", gguf(tensors=[tensor(shape=(size, 2), kind=kind)]), "bad-shape"
    for offset in (1, 31, 33, U64):
        yield f"offset {offset}", gguf(tensors=[tensor(offset=offset)]), "bad-field"
    for offset in (4096, 1 << 40, 1 << 63):
        yield f"offset past the end {offset}", gguf(tensors=[tensor(offset=offset)]), "truncated"
    yield "huge tensor", gguf(tensors=[tensor(shape=(1 << 20, 1 << 20))]), "truncated"
    yield "overlap", gguf(tensors=[tensor(), tensor("b.weight", offset=128)]), "overlap"
    yield "same place", gguf(tensors=[tensor(), tensor("b.weight")]), "overlap"
    yield "hole", gguf(tensors=[tensor(), tensor("b.weight", offset=512)]), "hole"
    yield "hole at the start", gguf(tensors=[tensor(offset=32)]), "hole"
    yield "shard of three under another name", gguf([pair("split.count", 2, b"\3\0")]), "shard-missing"
    for value in (0, 3, 48, 1 << 30, 0xFFFFFFFF):
        yield f"alignment {value}", gguf([pair("general.alignment", 4, struct.pack("<I", value))]), "bad-field"
    yield "negative alignment", gguf([pair("general.alignment", 5, struct.pack("<i", -32))]), "bad-field"
    yield "alignment as a boolean", gguf([pair("general.alignment", 7, b"\1")]), "bad-field"
    yield "alignment as text", gguf([pair("general.alignment", 8, string("32"))]), "bad-field"
    for cut in range(24, len(good) - 4096, 7):
        yield f"cut at {cut}", good[:cut], "truncated"
    yield "cut in the data", good[:-4000], "truncated"
    for magic in (b"lmgg", b"tjgg", b"FUGG", b"gguf", b"\x1f\x8b\x08\0", b"\x93NUM"):
        yield f"magic {magic!r}", gguf(magic=magic), "bad-magic"
    many = [tensor(f"t{i}", offset=i * 256) for i in range(20_000)]
    yield "overlap at the end of a long header", gguf(tensors=[*many, tensor("last")], data=6 << 20), "overlap"
