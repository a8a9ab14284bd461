"""Hostile files: headers that lie, made field by field. Each comes with the code that it must be refused with."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U64 = (1 << 64) - 1


@dataclass(frozen=True)
class Case:
    """Files to write into a folder, what to open, and the code of the refusal."""

    name: str
    files: dict[str, bytes]
    opened: str
    code: str
    links: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        for name, target in self.links.items():
            (folder / name).symlink_to(target)
        return folder / self.opened


# --- GGUF -----------------------------------------------------------------------------------------------------------


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


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
    for count in (1 << 20, 1 << 16, 1000):
        yield f"{count} tensors in a small file", gguf(tensor_count=count, data=0), "truncated"
    for count in (U64, 1 << 63, 1 << 40):
        yield f"{count} tensors", gguf(tensor_count=count), "limit-exceeded"
        yield f"{count} fields", gguf(field_count=count), "limit-exceeded"
    yield "more fields than bytes", gguf(field_count=60000), "truncated"
    for length in (U64, 1 << 63, 1 << 40, 2000):
        yield f"key of {length}", gguf([string("k", length)]), "limit-exceeded"
        yield f"tensor name of {length}", gguf(tensors=[string("k", length)]), "limit-exceeded"
    for length in (U64, 1 << 63, 1 << 40, 1 << 20):
        yield f"string of {length}", gguf([pair("k", 8, string("v", length))]), "truncated"
        yield (
            f"string of {length} in an array",
            gguf([pair("k", 9, struct.pack("<IQ", 8, 1) + string("v", length))]),
            "truncated",
        )
    for count in (U64, 1 << 63, 1 << 40, 1 << 23):
        for kind in (0, 4, 8, 9, 12):
            yield (
                f"array of {count} of type {kind}",
                gguf([pair("k", 9, struct.pack("<IQ", kind, count))]),
                "limit-exceeded",
            )
    for kind in (0, 4, 8, 9, 12):
        yield f"long array of type {kind}", gguf([pair("k", 9, struct.pack("<IQ", kind, 1 << 21))]), "truncated"
    for kind in (13, 255, 0xFFFFFFFF):
        yield f"field type {kind}", gguf([pair("k", kind, b"\0" * 8)]), "bad-field"
        yield f"array type {kind}", gguf([pair("k", 9, struct.pack("<IQ", kind, 1))]), "bad-field"
    nested = struct.pack("<IQ", 0, 0)
    for _ in range(1000):
        nested = struct.pack("<IQ", 9, 1) + nested
    yield "nested arrays", gguf([pair("k", 9, nested)]), "limit-exceeded"
    yield "boolean of 2", gguf([pair("k", 7, b"\2")]), "bad-field"
    yield "boolean of 7 in an array", gguf([pair("k", 9, struct.pack("<IQ", 7, 3) + b"\0\7\1")]), "bad-field"
    yield "key not UTF-8", gguf([pair(b"\xff\xfe", 0, b"\0")]), "bad-text"
    yield "empty key", gguf([pair("", 0, b"\0")]), "bad-text"
    yield "key with a NUL", gguf([pair("a\0b", 0, b"\0")]), "bad-text"
    yield "key twice", gguf([pair("k", 0, b"\0"), pair("k", 0, b"\1")]), "duplicate"
    yield "tensor name not UTF-8", gguf(tensors=[tensor(b"\xc3\x28")]), "bad-text"
    yield "empty tensor name", gguf(tensors=[tensor("")]), "bad-text"
    yield "tensor twice", gguf(tensors=[tensor(), tensor(offset=256)]), "duplicate"
    for dims in (0, 9, 1 << 20, 0xFFFFFFFF):
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
    for value in (0, 3, 48, 1 << 30, 0xFFFFFFFF):
        yield f"alignment {value}", gguf([pair("general.alignment", 4, struct.pack("<I", value))]), "bad-field"
    yield "alignment as text", gguf([pair("general.alignment", 8, string("32"))]), "bad-field"
    for cut in range(24, len(good) - 4096, 7):
        yield f"cut at {cut}", good[:cut], "truncated"
    yield "cut in the data", good[:-4000], "truncated"


# --- safetensors ----------------------------------------------------------------------------------------------------


def safetensors(header: object, data: int = 8, *, length: int | None = None, raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors_cases() -> Iterator[tuple[str, bytes, str]]:
    good = safetensors({"a": entry()})
    yield "empty", b"", "bad-magic"
    yield "seven bytes", b"\1" * 7, "bad-magic"
    yield "lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "bad-magic"
    yield "web page", b"<!doctype html><html></html>", "bad-magic"
    yield "gguf", gguf(), "bad-magic"
    yield "zip", b"PK\x03\x04" + b"\0" * 40, "bad-magic"
    for length in (0, 1, len(good), len(good) - 7, 10_000_000, 99_999_999):
        yield f"header of {length}", safetensors({"a": entry()}, length=length), "truncated"
    for length in (100_000_001, 1 << 40, 1 << 63, U64):
        yield f"header of {length}", safetensors({"a": entry()}, length=length), "limit-exceeded"
    for name, raw in {
        "no JSON": b"this is not JSON",
        "half JSON": b'{"a": {"dtype": "F32", ',
        "list": b"[1, 2, 3]",
        "number": b"17",
        "null": b"null",
        "deep lists": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "open brackets": b"[" * 200_000,
        "quotes": b'"\\"' * 60_000,
        "two objects": b'{"a":1}{"b":2}',
    }.items():
        yield name, safetensors(None, raw=raw), "bad-json"
    yield "not UTF-8", safetensors(None, raw=b'{"\xff\xfe": 1}'), "bad-text"
    yield (
        "tensor twice",
        safetensors(None, raw=b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}'),
        "duplicate",
    )
    yield (
        "dtype twice",
        safetensors(None, raw=b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
        "duplicate",
    )
    for name in ("", "a\0b", "a\nb", "\x1b[31m"):
        yield f"named {name!r}", safetensors({name: entry()}), "bad-text"
    for dtype in ("F33", "f32", "", 1, None, ["F32"], "Q4_0"):
        yield f"dtype {dtype!r}", safetensors({"a": entry(dtype)}), "bad-dtype"
    for shape in (
        -1, 2, None, "2", [-2], [2.0], [True, 2], [None], [[2]], [1 << 63], ["2"], [1] * 9, {"0": 2}, [float("nan")]
    ):  # fmt: skip
        yield f"shape {shape!r}", safetensors({"a": entry(shape=shape)}), "bad-shape"
    for shape in ([3], [1], [1 << 40, 1 << 40], [0], [1 << 62, 4], []):
        yield f"shape {shape!r} of eight bytes", safetensors({"a": entry(shape=shape)}), "bad-shape"
    for offsets in (None, 0, [], [0], [0, 4, 8], [0, 8.0], [-8, 0], ["0", "8"], [0, U64], [True, 8], {"begin": 0}):
        yield f"offsets {offsets!r}", safetensors({"a": entry(offsets=offsets)}), "bad-field"
    for offsets in ([8, 0], [0, 9], [8, 16], [0, 1 << 40]):
        yield f"offsets {offsets!r}", safetensors({"a": entry(offsets=offsets)}), "truncated"
    yield "overlap", safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, 12), "overlap"
    yield "same bytes", safetensors({"a": entry(), "b": entry()}), "overlap"
    yield "hole", safetensors({"a": entry(), "b": entry(offsets=(16, 24))}, 24), "hole"
    yield "hole at the start", safetensors({"a": entry(offsets=(8, 16))}, 16), "hole"
    yield "bytes at the end", safetensors({"a": entry()}, 9), "hole"
    yield "half a byte", safetensors({"a": entry("F4", [15], (0, 8))}), "bad-shape"
    for extra in ({}, 3, [], "F32", {"dtype": "F32"}, {**entry(), "more": 1}):
        yield f"entry {extra!r}", safetensors({"a": extra}), "bad-field"
    for metadata in (1, "text", [], {"a": 1}, {"a": {"b": "c"}}, None):
        yield f"metadata {metadata!r}", safetensors({"__metadata__": metadata, "a": entry()}), "bad-field"
    for cut in range(8, len(good) - 8, 5):
        yield f"cut at {cut}", good[:cut], "truncated"
    yield "cut in the data", good[:-1], "truncated"


# --- folders --------------------------------------------------------------------------------------------------------

CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
SHARD = safetensors({"a": entry()})
OTHER = safetensors({"b": entry()})


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}).encode()


def folder_cases() -> Iterator[Case]:
    def case(name: str, code: str, files: dict[str, Any], **rest: Any) -> Case:
        return Case(name, {"config.json": CONFIG, **files}, "", code, **rest)

    def indexed(name: str, code: str, weight_map: object, **rest: Any) -> Case:
        files = {"model-00001-of-00001.safetensors": SHARD, "model.safetensors.index.json": index(weight_map)}
        return case(name, code, {**files, **rest.pop("more", {})}, **rest)

    first = "model-00001-of-00001.safetensors"
    for shard in ("../x.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "x\0y"):
        yield indexed(f"shard {shard!r}", "shard-unsafe", {"a": shard})
    yield indexed("shard is absent", "shard-missing", {"a": "model-00002-of-00002.safetensors"})
    yield indexed(
        "shard is a link out", "shard-unsafe", {"a": "link.safetensors"}, links={"link.safetensors": "/etc/hostname"}
    )
    yield indexed("index names too much", "index-inconsistent", {"a": first, "b": first})
    yield indexed("index names too little", "index-inconsistent", {"b": "o.safetensors"}, more={"o.safetensors": safetensors({"b": entry(), "c": entry(offsets=(8, 16))}, 16)})  # fmt: skip
    yield indexed(
        "index names the wrong shard",
        "index-inconsistent",
        {"a": "o.safetensors", "b": first},
        more={"o.safetensors": OTHER},
    )
    yield indexed("two shards hold it", "duplicate", {"a": first, "b": "o.safetensors"}, more={"o.safetensors": SHARD})
    for weight_map in (None, [], {}, "text", 3):
        yield indexed(f"weight_map {weight_map!r}", "bad-field", weight_map)
    for value in (1, None, [first], {}):
        yield indexed(f"shard name {value!r}", "bad-field", {"a": value})
    yield case("index is no JSON", "bad-json", {first: SHARD, "model.safetensors.index.json": b"{"})
    yield case("a shard of three is absent", "shard-missing", {"m-00001-of-00003.safetensors": SHARD, "m-00003-of-00003.safetensors": OTHER})  # fmt: skip
    yield case("two files and no index", "ambiguous-checkpoint", {"x.safetensors": SHARD, "y.safetensors": OTHER})
    yield case("pickles", "unsafe-container", {"pytorch_model.bin": b"PK\x03\x04"})
    yield case("nothing", "not-a-checkpoint", {})
    yield case("config is no JSON", "bad-json", {"config.json": b"{model_type: llama}", "model.safetensors": SHARD})
    yield case("config is a list", "bad-json", {"config.json": b"[]", "model.safetensors": SHARD})
    yield case("config nests", "bad-json", {"config.json": b'{"a":' * 100_000, "model.safetensors": SHARD})
    yield case("config key twice", "duplicate", {"config.json": b'{"a":1,"a":2}', "model.safetensors": SHARD})
    yield case("config is not UTF-8", "bad-text", {"config.json": b'{"a":"\xff"}', "model.safetensors": SHARD})
    for method in ("foo", "", 3, None, ["gptq"]):
        config = json.dumps({"model_type": "llama", "quantization_config": {"quant_method": method}}).encode()
        yield case(f"quant_method {method!r}", "unknown-method", {"config.json": config, "model.safetensors": SHARD})
    for value in (3, "gptq", [1]):
        config = json.dumps({"model_type": "llama", "quantization_config": value}).encode()
        yield case(f"quantization_config {value!r}", "bad-field", {"config.json": config, "model.safetensors": SHARD})
    codes = safetensors({"a.weight": {"dtype": "I8", "shape": [2, 4], "data_offsets": [0, 8]}})
    yield case("codes without a config", "unknown-method", {"model.safetensors": codes})
    yield Case("no config", {"model.safetensors": SHARD}, "", "not-a-checkpoint")
    yield Case("several GGUFs", {"a.gguf": gguf(), "b.gguf": gguf()}, "", "ambiguous-checkpoint")
    yield Case("GGUF shard is absent", {"m-00001-of-00002.gguf": gguf()}, "m-00001-of-00002.gguf", "shard-missing")
    yield Case("no GGUF shards at all", {"m-00001-of-00000.gguf": gguf()}, "m-00001-of-00000.gguf", "limit-exceeded")
    yield Case("GGUF tensors twice", {"m-00001-of-00002.gguf": gguf(), "m-00002-of-00002.gguf": gguf()}, "m-00001-of-00002.gguf", "duplicate")  # fmt: skip


def cases() -> list[Case]:
    """All of them; names are unique."""
    found = [Case(f"gguf: {name}", {"m.gguf": data}, "m.gguf", code) for name, data, code in gguf_cases()]
    for name, data, code in safetensors_cases():
        files = {"config.json": CONFIG, "model.safetensors": data}
        found.append(Case(f"safetensors: {name}", files, "model.safetensors", code))
    return [*found, *folder_cases()]
