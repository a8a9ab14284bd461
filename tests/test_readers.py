"""The readers against the reference libraries on valid files, and against mutations of them."""

import json
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import qcore
from hostile import entry, safetensors
from hostile_gguf import gguf as gguf_file
from hostile_gguf import pair as gguf_pair
from hostile_gguf import string as gguf_string
from hostile_gguf import tensor as gguf_tensor
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.json_file import read_json
from qcore.checkpoint.safetensors import SafetensorsSource

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(qcore.Refused) as caught:
        call()
    return caught.value.refusal.code


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    made = {f"t.{i}": torch.randint(0, 2, (3, 5)).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "rank3": torch.randn(2, 3, 4)}


def test_safetensors_reads_what_the_library_wrote(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource.open(tmp_path)
    assert source.tensors.keys() == tensors.keys() and source.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert same_bytes(source.read(name), tensor), name
    assert same_bytes(source.read_rows("rank3", 1, 2), tensors["rank3"][1:2])
    assert same_bytes(source.read_rows("t.3", 1, 9), tensors["t.3"][1:])
    assert same_bytes(source.read_rows("t.3", -1, 3), tensors["t.3"][-1:])
    assert same_bytes(source.read_rows("t.3", 2, 1), tensors["t.3"][2:1])
    assert same_bytes(source.read_rows("empty", 0, 5), tensors["empty"])
    assert refused(lambda: source.read_rows("scalar", 0, 1)) == "bad-shape"


def test_types_narrower_than_a_byte_come_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {
        "f4": entry("F4", [4, 8], [0, 16]),
        "e2m3": entry("F6_E2M3", [2, 2, 8], [16, 40]),
        "e3m2": entry("F6_E3M2", [4, 4], [40, 52]),
        "odd": entry("F4", [2, 3], [52, 55]),
    }
    path.write_bytes(safetensors(header, 0) + bytes(range(55)))
    source = SafetensorsSource.open(path)
    assert source.read("f4").tolist() == np.arange(16).reshape(4, 4).tolist()
    assert source.read("e2m3").tolist() == np.arange(16, 40).reshape(4, 6).tolist()
    assert source.read_rows("e2m3", 1, 2).tolist() == np.arange(28, 40).reshape(2, 6).tolist()
    assert source.read("e3m2").tolist() == np.arange(40, 52).reshape(4, 3).tolist()
    assert refused(lambda: source.read("odd")) == refused(lambda: source.read_rows("odd", 0, 1)) == "bad-shape"


def test_sharded_safetensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors, reverse=True)
    shards = {"model-00001-of-00002.safetensors": names[:6], "model-00002-of-00002.safetensors": names[6:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    by_pattern = SafetensorsSource.open(tmp_path)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    by_index = SafetensorsSource.open(tmp_path)
    by_name = SafetensorsSource.open(tmp_path / "model-00002-of-00002.safetensors")
    for source in (by_pattern, by_index, by_name):
        assert source.tensors.keys() == tensors.keys()
        assert all(same_bytes(source.read(name), tensors[name]) for name in names)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "other.safetensors.index.json")
    assert SafetensorsSource.open(tmp_path).tensors.keys() == tensors.keys()
    save_file({"alone": torch.ones(1)}, tmp_path / "model.safetensors")  # transformers takes this one first, too
    assert SafetensorsSource.open(tmp_path).tensors.keys() == {"alone"}


@pytest.mark.parametrize("folder", [".", "UD-Q4"])
def test_the_hugging_face_cache_layout_is_read(tmp_path: Path, folder: str) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc" / folder
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    for name in ("model-00001-of-00001.safetensors", "model-00001-of-00002.gguf", "model-00002-of-00002.gguf"):
        (snapshot / name).symlink_to(Path(os.path.relpath(blobs, snapshot)) / name)
    save_file({"a": torch.ones(2)}, blobs / "model-00001-of-00001.safetensors")
    (blobs / "model-00001-of-00002.gguf").write_bytes(gguf_file())
    (blobs / "model-00002-of-00002.gguf").write_bytes(gguf_file(tensors=[gguf_tensor("b")]))
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    assert torch.equal(SafetensorsSource.open(snapshot).read("a"), torch.ones(2))
    assert GgufSource.open(snapshot / "model-00002-of-00002.gguf").tensors.keys() == {"a.weight", "b"}


def test_real_checkpoints_read_alike() -> None:
    for path in sorted(GOLDEN.glob("*/model.safetensors")):
        source = SafetensorsSource.open(path.parent)
        with safe_open(path, "pt") as reference:
            assert source.tensors.keys() == set(reference.keys())
            assert all(same_bytes(source.read(name), reference.get_tensor(name)) for name in reference.keys())  # noqa: SIM118


def write_gguf(path: Path, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> dict[str, np.ndarray]:
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -2)
    writer.add_int64("a.i64", -(1 << 60))
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_array("a.truths", [True, False])
    writer.add_custom_alignment(64)
    writer.add_uint32("a.u32", 7)
    writer.add_int32("a.i32", -7)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_uint64("a.u64", 1 << 60)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve 日本")
    writer.add_array("a.words", ["x", "", "é"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.5, -1.0])
    rng = np.random.default_rng(0)
    held = {
        "f32": rng.standard_normal((3, 4)).astype(np.float32),
        "f16": rng.standard_normal((2, 32)).astype(np.float16),
        "f64": rng.standard_normal(5),
        "i8": np.arange(-3, 3, dtype=np.int8),
        "i32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
    }
    for name, array in held.items():
        writer.add_tensor(name, array)
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_1"):
        quantized = gguf.quants.quantize(
            rng.standard_normal((2, 3, 64)).astype(np.float32), getattr(gguf.GGMLQuantizationType, kind)
        )
        held[kind] = quantized
        # gguf-py swaps the bytes of arrays, but not of blocks
        stored = quantized if endian == gguf.GGUFEndian.LITTLE else swap_blocks(quantized, kind)
        writer.add_tensor(kind, stored, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def swap_blocks(data: np.ndarray, kind: str) -> np.ndarray:
    """The float16 fields (and Q5_1's bit word) of every block, byte-swapped; written out by hand."""
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_1": 24}[kind]
    blocks = data.reshape(-1, size).copy()
    for start, stop in {"Q8_0": [(0, 2)], "Q4_0": [(0, 2)], "Q4_1": [(0, 2), (2, 4)], "Q5_1": [(0, 2), (2, 4), (4, 8)]}[
        kind
    ]:
        blocks[:, start:stop] = blocks[:, start:stop][:, ::-1]
    return blocks.reshape(data.shape)


@pytest.mark.parametrize("endian", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
@pytest.mark.parametrize("version", [2, 3])
def test_gguf_reads_what_the_library_wrote(tmp_path: Path, endian: gguf.GGUFEndian, version: int) -> None:
    path = tmp_path / "m.gguf"
    held = write_gguf(path, endian)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I" if endian == gguf.GGUFEndian.LITTLE else ">I", version)
    path.write_bytes(data)
    source = GgufSource.open(path)
    expected = {
        "a.u8": 255, "a.i8": -128, "a.u16": 65535, "a.i16": -2, "a.i64": -(1 << 60), "a.nested": [[1, 2], [3]],
        "a.truths": [True, False], "general.alignment": 64, "a.u32": 7, "a.i32": -7, "a.f32": 0.5, "a.f64": 0.1, "a.u64": 1 << 60, "a.bool": True, "a.text": "naïve 日本",
        "a.words": ["x", "", "é"], "a.numbers": [1, 2, 3], "a.floats": [0.5, -1.0], "GGUF.version": version,
    }  # fmt: skip
    assert {key: source.metadata[key] for key in expected} == expected
    for name, array in held.items():
        blocks = name[0] == "Q"
        assert source.tensors[name].shape == ((2, 3, 64) if blocks else array.shape)
        assert np.array_equal(source.read(name).numpy(), array.reshape(6, -1) if blocks else array), name
    assert np.array_equal(source.read_rows("Q4_1", 1, 2).numpy(), held["Q4_1"][1])
    assert np.array_equal(source.read_rows("f32", 2, 3).numpy(), held["f32"][2:3])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/*.gguf")), ids=lambda path: path.stem)
def test_real_ggufs_read_alike(path: Path) -> None:
    source, reference = GgufSource.open(path), gguf.GGUFReader(path)
    assert list(source.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        info = source.tensors[tensor.name]
        assert (info.dtype, info.offset, info.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert list(info.shape) == tensor.shape.tolist()[::-1]
        assert np.array_equal(source.read(tensor.name).numpy().reshape(-1), np.asarray(tensor.data).reshape(-1))
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            assert source.metadata[key] == field.contents(), key


@pytest.mark.alone
def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    """Long texts lie across the reader's window; tokens may be pieces of characters."""
    tokens = [f"token{i}".encode() for i in range(300_000)]
    tokens[1000:1000] = [b"\xe6\x97", b"", b"long" * 200_000, b"\xff" * 300_000]
    scores = np.linspace(-1, 1, len(tokens), dtype=np.float32)
    template = "é" * 300_001
    fields = [
        gguf_pair("tokens", 9, struct.pack("<IQ", 8, len(tokens)) + b"".join(map(gguf_string, tokens))),
        gguf_pair("scores", 9, struct.pack("<IQ", 6, len(tokens)) + scores.tobytes()),
        gguf_pair("template", 8, gguf_string(template)),
    ]
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf_file(fields, tensors=[], data=0))
    began = time.process_time()
    source = GgufSource.open(path)
    assert time.process_time() - began < 1.0
    assert not source.tensors and list(source.metadata) == ["tokens", "scores", "template", "GGUF.version"]
    assert [token.encode("utf-8", "surrogateescape") for token in source.metadata["tokens"]] == tokens
    assert source.metadata["scores"] == scores.tolist() and source.metadata["template"] == template


def test_gguf_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{number}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        if number == 1:
            writer.add_string("general.name", "split")
        writer.add_tensor(f"t{number}", np.full((2, 2), number, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    source = GgufSource.open(tmp_path / "m-00001-of-00002.gguf")
    assert source.metadata["general.name"] == "split" and source.metadata["split.no"] == 0
    assert float(source.read("t1").sum()) == 4 and float(source.read("t2").sum()) == 8
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(gguf_file([gguf_pair("split.count", 2, b"\0\0")]))  # what llama.cpp writes when it joins shards
    assert GgufSource.open(joined).metadata["split.count"] == 0


def test_nothing_stays_open_or_mapped(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1 << 20)}, tmp_path / "model.safetensors")
    write_gguf(tmp_path / "m.gguf")
    before = len(list(Path("/proc/self/fd").iterdir()))
    sources = [SafetensorsSource.open(tmp_path / "model.safetensors"), GgufSource.open(tmp_path / "m.gguf")]
    held = [source.read(name) for source in sources for name in source.tensors]
    assert held and len(list(Path("/proc/self/fd").iterdir())) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8)}, path)
    source = SafetensorsSource.open(path)
    os.utime(path, (1, 1))
    assert refused(lambda: source.read("a")) == "truncated"
    source = SafetensorsSource.open(path)
    path.write_bytes(path.read_bytes()[:-4])
    assert refused(lambda: source.read("a")) == "truncated"
    path.unlink()
    assert refused(lambda: source.read("a")) == "path-not-found"


@pytest.mark.parametrize("opener", [SafetensorsSource.open, GgufSource.open, read_json])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, opener: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(lambda: opener(tmp_path / "pipe")) == "bad-magic"
    assert refused(lambda: opener(tmp_path / "nothing")) == "path-not-found"
    assert refused(lambda: opener(Path("/dev/zero"))) == "bad-magic"
    assert refused(lambda: opener(tmp_path)) in ("bad-magic", "not-a-checkpoint")


def test_a_tensor_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a": entry("U8", [1 << 32], [0, 1 << 32])}, 0))
    os.truncate(path, path.stat().st_size + (1 << 32))
    source = SafetensorsSource.open(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        assert refused(lambda: source.read("a")) == "not-enough-memory"
        assert source.read_rows("a", 1 << 31, (1 << 31) + 3).tolist() == [0, 0, 0]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("start", "look"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "download the file again"),
        (b"PK\x03\x04", "Convert it to safetensors"),
        (b"\x80\x04\x95\x10", "Convert it to safetensors"),
        (b"tjgg\1\0\0\0", "a current llama.cpp"),
    ],
)
def test_a_wrong_file_is_recognized(tmp_path: Path, start: bytes, look: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(start + b"\0" * 100)
    for opener in (GgufSource.open, SafetensorsSource.open):
        with pytest.raises(qcore.Refused) as caught:
            opener(path)
        assert caught.value.refusal.code == "bad-magic" and look in caught.value.refusal.fix


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("small")
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(3, dtype=torch.int8)}, folder / "m.safetensors")
    write_gguf(folder / "m.gguf")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


mutations = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "set", "insert", "drop", "grow", "splice"]),
        st.integers(0, 4000),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
@settings(derandomize=True, max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=mutations)
def test_mutated_files_are_refused_or_read(
    small_files: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    changes: list[tuple[str, int, int]],
) -> None:
    data = bytearray(small_files[suffix])
    for kind, place, value in changes:
        at = place % max(1, min(len(data), 600))  # headers are what can lie
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= 1 << value % 8
        elif kind == "set" and data:
            data[at] = value
        elif kind == "insert":
            data[at:at] = bytes([value]) * (value % 9)
        elif kind == "drop":
            del data[at : at + value % 9]
        elif kind == "grow" and data:
            data[at : at + 8] = (1 << value % 64).to_bytes(8, "little")
        elif kind == "splice":
            data[at:at] = data[value : value + place % 64]
    path = tmp_path_factory.mktemp("mutated") / f"m{suffix}"
    path.write_bytes(data)
    opener = SafetensorsSource if suffix == ".safetensors" else GgufSource
    try:
        source = opener.open(path)
        for name, info in source.tensors.items():
            assert source.read(name).nbytes == info.nbytes
    except qcore.Refused as error:
        assert str(path) in error.refusal.subject
