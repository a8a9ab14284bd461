"""Hostile files: headers that lie, made field by field. Each comes with the code that it must be refused with."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hostile_gguf import ARCH, U64, array, gguf, gguf_cases, pair, string, tensor


@dataclass(frozen=True)
class Case:
    """Files to write into a folder, what to open, and the code of the refusal.

    links: symbolic links and where they lead. sizes: files made longer by zeros that take no place on the disk.
    pipes: named pipes, which would make a careless reader wait for ever.
    """

    name: str
    files: dict[str, bytes]
    opened: str
    code: str
    links: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    pipes: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        for name in (*self.files, *self.links, *self.pipes):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        for name, target in self.links.items():
            (folder / name).symlink_to(target)
        for name, size in self.sizes.items():
            os.truncate(folder / name, size)
        for name in self.pipes:
            os.mkfifo(folder / name)
        return folder / self.opened


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
        "space before": b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "zeros after": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + b"\0" * 8,
        "line break in a name": b'{"a\n":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "deep after strings": b'{"\\\\\\"[[":"' + b"\\\\" * 700_000 + b'","b":' + b"[" * 70,
        "long number": b'{"a":' + b"1" * 100_000 + b"}",
    }.items():
        yield name, safetensors(None, raw=raw), "bad-json"
    for name, raw in {
        "empty lists": b'{"a":[' + b"[]," * 1_000_000 + b"0]}",
        "zeros": b'{"a":[' + b"0," * 1_000_000 + b"0]}",
        "empty objects": b'{"a":[' + b"{}," * 1_000_000 + b"0]}",
    }.items():
        yield name, safetensors(None, raw=raw), "limit-exceeded"
    yield "half a surrogate pair", safetensors(None, raw=b'{"\\ud800": 1}'), "bad-text"
    yield "half a surrogate pair in metadata", safetensors(None, raw=b'{"__metadata__":{"a":"\\udfff"}}'), "bad-text"
    many = {f"model.layers.{i}.weight": entry(offsets=(i * 8, i * 8 + 8)) for i in range(20_000)}
    yield "wrong entry at the end of a long header", safetensors({**many, "last": entry("F33")}, 160_000), "bad-dtype"
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
    for shard in ("model-00002-of-00002.safetensors", "long" * 2000, " ", "~", "%2e%2e"):
        yield indexed(f"shard {shard[:40]!r} is absent", "shard-missing", {"a": shard})
    for name, target, code in (
        ("out", "/etc/hostname", "shard-unsafe"),
        ("to a folder", "/etc", "shard-missing"),
        ("to nothing", "nothing", "shard-missing"),
        ("to itself", "link", "shard-missing"),
        ("to the config", "config.json", "bad-magic"),
    ):
        yield indexed(f"shard is a link {name}", code, {"a": "link"}, links={"link": target})
    yield indexed("shard is the index", "bad-magic", {"a": "model.safetensors.index.json"})
    yield indexed("shard is the config", "bad-magic", {"a": "config.json"})
    yield indexed("shard is a pipe", "shard-missing", {"a": "pipe"}, pipes=("pipe",))
    for name, target in (
        ("another model's", "../../../models--c--d/blobs/0123"),
        ("no blob", "../../0123"),
        ("beside the cache", "../../../0123"),
    ):
        snapshot = "models--a--b/snapshots/abc"
        files = {f"{snapshot}/config.json": CONFIG, f"{snapshot}/model.safetensors.index.json": index({"a": "link"})}
        blobs = {"models--c--d/blobs/0123": SHARD, "models--a--b/0123": SHARD, "0123": SHARD}
        links = {f"{snapshot}/link": target}
        yield Case(f"link in a cache to {name}", {**files, **blobs}, snapshot, "shard-unsafe", links)
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
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "model.pkl"):
        yield case(f"pickles in {name}", "unsafe-container", {name: b"\x80\x02cos\nsystem\nq\x00."})
        yield Case(f"the pickle {name}", {name: b"PK\x03\x04"}, name, "unsafe-container")
        yield case(f"{name} and an index", "not-a-checkpoint", {"pytorch_model.bin.index.json": index({"a": name})})
    for name, data in (("a pickle", b"\x80\x02cos\nsystem\nq\x00."), ("a zip archive", b"PK\x03\x04" + bytes(40))):
        yield case(f"{name} named as safetensors", "bad-magic", {"model.safetensors": data})
    for name, target in (("out", "/etc/hostname"), ("to a device", "/dev/zero"), ("above", "../../secret")):
        code = "path-not-found" if name == "above" else "bad-magic"
        yield case(f"the weights are a link {name}", code, {}, links={"model.safetensors": target})
        linked = Case(f"the config is a link {name}", {"model.safetensors": SHARD}, "", "", {"config.json": target})
        yield replace(linked, code="not-a-checkpoint" if name != "out" else "bad-json")
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
    yield Case("safetensors named as GGUF", {"m.gguf": SHARD}, "m.gguf", "bad-magic")
    yield Case("a folder named as a GGUF file", {"m.gguf/x": b""}, "m.gguf", "not-a-checkpoint")
    yield case("a pipe named as weights", "bad-magic", {}, pipes=("model.safetensors",))
    yield case("a folder named as weights", "bad-magic", {"model.safetensors/x": b""})
    yield Case("a pipe named as a config", {"model.safetensors": SHARD}, "", "not-a-checkpoint", pipes=("config.json",))
    yield Case("GGUF shard is absent", {"m-00001-of-00002.gguf": gguf()}, "m-00001-of-00002.gguf", "shard-missing")
    yield Case("no GGUF shards at all", {"m-00001-of-00000.gguf": gguf()}, "m-00001-of-00000.gguf", "limit-exceeded")
    first, second = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
    yield Case("GGUF tensors twice", {first: gguf(), second: gguf()}, first, "duplicate")
    yield Case("GGUF shard is a link out", {first: gguf()}, first, "shard-unsafe", {second: "/etc/hostname"})
    yield Case("GGUF shard is a link to itself", {first: gguf()}, first, "shard-missing", {second: second})
    for name, fields in {
        "another count": pair("split.count", 2, b"\3\0"),
        "another number": pair("split.no", 2, b"\1\0"),
        "its number as text": pair("split.no", 8, string("0")),
    }.items():
        yield Case(f"GGUF shard says {name}", {first: gguf([ARCH, fields]), second: gguf(tensors=[tensor("b")])}, first, "index-inconsistent")  # fmt: skip


# --- INC's measurements ----------------------------------------------------------------------------------------------


def measurement_cases() -> Iterator[Case]:
    """Plain weights with a QUANT_CONFIG and measurements that are no such thing."""
    weights = safetensors({"a.weight": entry(shape=[1, 2])})
    name = "m_hooks_maxabs.json"

    def case(what: str, code: str, data: bytes | None, stats: str = "m", **rest: Any) -> Case:
        config = json.dumps({"method": "HOOKS", "mode": "QUANTIZE", "dump_stats_path": stats}).encode()
        files = {"config.json": CONFIG, "quant_config.json": config, "model.safetensors": weights}
        return Case(f"measurements: {what}", files if data is None else {**files, name: data}, "", code, **rest)

    yield case("none", "path-not-found", None)
    yield case("no JSON", "bad-json", b"{")
    yield case("nested", "bad-json", b'{"Nodes":' * 100_000)
    yield case("lists of lists", "bad-json", b'{"Nodes":{"a":{"inputs":' + b"[" * 50_000 + b"]" * 50_000 + b"}}}")
    yield case("a pickle", "unsafe-container", None, pipes=("m_hooks_maxabs.npz",))
    yield case("a link to a folder", "bad-magic", None, links={name: "/etc"})
    yield case("out of the folder", "path-not-found", None, "../../../etc/m")
    yield case("a long name", "path-not-found", None, "x/" + "y" * 5000 + "/m")
    yield case("a zero byte", "path-not-found", None, "a\0b/m")
    yield case("of 1 TiB", "limit-exceeded", b"{", sizes={name: 1 << 40})
    for found in (None, [], 3, {"a": []}, {"b": {}}, {"a": {"inputs": {}}}, {"a": {"inputs": [["x"]]}}):
        code = "bad-content" if found in ({"a": {"inputs": [["x"]]}},) else "bad-field"
        yield case(f"Nodes {found!r}", code, json.dumps({"Nodes": found}).encode())


# --- long files of zeros --------------------------------------------------------------------------------------------


def sparse_cases() -> Iterator[Case]:
    """Files as long as they say: nothing is truncated here, and a reader that believes them fills the memory."""

    def head(*fields: bytes, count: int | None = None, tensors: int = 0) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields) + 1 if count is None else count) + b"".join(fields)

    for name, data, code in (
        ("a text of 512 MiB", head(pair("k", 8, struct.pack("<Q", 1 << 29))), "limit-exceeded"),
        ("a text of 60 MiB", head(pair("k", 8, struct.pack("<Q", 60 << 20))), "bad-text"),
        ("three million texts", head(array(8, 3_000_000)), "bad-text"),
        ("a text of 512 MiB in an array", head(array(8, 1, struct.pack("<Q", 1 << 29))), "limit-exceeded"),
        ("four million doubles", head(array(12, 4_000_000)), "bad-text"),
        ("four million booleans", head(array(7, 4_000_000)), "bad-text"),
        ("sixty thousand arrays", head(array(9, 60_000)), "bad-text"),
        ("a million arrays", head(array(9, 1_000_000)), "limit-exceeded"),
        ("two arrays of numbers, together too many", head(array(0, 1000, b"\0" * 1000), pair("l", 9, struct.pack("<IQ", 0, 4 << 20))), "limit-exceeded"),
        ("fields of nothing", head(count=1 << 14), "bad-text"),
        ("tensors of nothing", head(count=0, tensors=1 << 16), "bad-text"),
    ):  # fmt: skip
        yield Case(f"gguf: {name}", {"m.gguf": data}, "m.gguf", code, sizes={"m.gguf": 1 << 30})
    for name, data in (
        ("zeros for a header", struct.pack("<Q", 99_999_999)),
        ("zeros in a header", struct.pack("<Q", 99_999_999) + b"{"),
        ("zeros in a name", struct.pack("<Q", 99_999_999) + b'{"'),
    ):
        files = {"config.json": CONFIG, "model.safetensors": data}
        yield Case(f"safetensors: {name}", files, "", "bad-json", sizes={"model.safetensors": 1 << 30})
    for size, code in ((60 << 20, "bad-json"), (65 << 20, "limit-exceeded"), (1 << 40, "limit-exceeded")):
        for file in ("config.json", "model.safetensors.index.json"):
            files = {"config.json": CONFIG, "model.safetensors.index.json": index({"a": "a"})}
            yield Case(f"{file} of {size} bytes", files, "", code, sizes={file: size})


def cases() -> list[Case]:
    """All of them; names are unique."""
    found = [Case(f"gguf: {name}", {"m.gguf": data}, "m.gguf", code) for name, data, code in gguf_cases()]
    for name, data, code in safetensors_cases():
        files = {"config.json": CONFIG, "model.safetensors": data}
        found.append(Case(f"safetensors: {name}", files, "model.safetensors", code))
    return [*found, *folder_cases(), *measurement_cases(), *sparse_cases()]
