"""GGUF files that the writer makes, read by gguf-py and by the package's own reader."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from qcore.blocks.quantize import quantize_blocks
from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.gguf_writer import GgufTensor, Typed, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "ein Löwe",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "", "ł", "\udcc3"],
    "tokenizer.ggml.scores": [0.5, -1, 2.0],
    "tokenizer.ggml.token_type": [1, 3, 1],
    "tokenizer.ggml.precompiled_charsmap": [0, 255],
    "some.flags": [True, False],
    "some.large": 1 << 40,
    "some.negative": -5,
    "some.double": Typed("float64", 0.1),
    "some.bytes": Typed("uint8", [1, 2, 255]),
    "some.empty": Typed("float32", []),
    "some.texts": Typed("string", []),
    "split.count": 1,
}
KINDS = {
    "general.name": ["STRING"],
    "llama.block_count": ["UINT32"],
    "llama.rope.freq_base": ["FLOAT32"],
    "tokenizer.ggml.add_bos_token": ["BOOL"],
    "tokenizer.ggml.tokens": ["ARRAY", "STRING"],
    "tokenizer.ggml.scores": ["ARRAY", "FLOAT32"],
    "tokenizer.ggml.token_type": ["ARRAY", "INT32"],
    "tokenizer.ggml.precompiled_charsmap": ["ARRAY", "UINT8"],
    "some.flags": ["ARRAY", "BOOL"],
    "some.large": ["UINT64"],
    "some.negative": ["INT32"],
    "some.double": ["FLOAT64"],
    "some.bytes": ["ARRAY", "UINT8"],
    "split.count": ["UINT16"],
}
PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def contents() -> dict[str, tuple[str, tuple[int, ...], torch.Tensor]]:
    """A tensor of every type, with sizes that leave room for padding."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in PLAIN.items():
        values = torch.randn(3, 5, generator=generator).mul(10).to(dtype)
        found[f"plain.{name}"] = (name, (3, 5), values)
    for name in BLOCK_TYPES:
        blocks = quantize_blocks(name, torch.randn(3, 512, generator=generator))
        found[f"blocks.{name}"] = (name, (3, 512), blocks)
    found["experts"] = ("q8_0", (2, 3, 32), quantize_blocks("q8_0", torch.randn(6, 32, generator=generator)))
    found["one"] = ("F32", (1,), torch.ones(1))
    return found


def written(path: Path, metadata: dict[str, Any] | None = None) -> Path:
    tensors = [
        GgufTensor(name, kind, shape, lambda data=data: data.split(2))  # type: ignore[misc]
        for name, (kind, shape, data) in contents().items()
    ]
    write_gguf(path, METADATA if metadata is None else metadata, tensors)
    return path


def one(shape: tuple[int, ...] = (2, 32), dtype: str = "F32", name: str = "a") -> GgufTensor:
    return GgufTensor(name, dtype, shape, lambda: [torch.zeros(shape)])


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_the_own_reader_gives_everything_back(tmp_path: Path, alignment: int | None) -> None:
    aligned = {} if alignment is None else {"general.alignment": alignment}
    source = GgufSource.open(written(tmp_path / "a.gguf", METADATA | aligned))
    expected = {key: value.value if isinstance(value, Typed) else value for key, value in METADATA.items()}
    assert source.metadata == {**expected, **aligned, "GGUF.version": 3}
    assert list(source.tensors) == list(contents())
    for name, (kind, shape, data) in contents().items():
        info, read = source.tensors[name], source.read(name)
        assert (info.dtype, info.shape) == (kind.upper(), shape)
        assert read.dtype == data.dtype and torch.equal(read, data)


def test_gguf_py_gives_everything_back(tmp_path: Path) -> None:
    metadata = {key: value for key, value in METADATA.items() if key != "tokenizer.ggml.tokens"}
    metadata["tokenizer.ggml.tokens"] = ["a", "", "ł"]
    path = tmp_path / "a.gguf"
    known = {name: value for name, value in contents().items() if name not in ("blocks.q2_0", "blocks.q1_0")}
    tensors = [GgufTensor(name, kind, shape, lambda data=data: [data]) for name, (kind, shape, data) in known.items()]  # type: ignore[misc]
    write_gguf(path, metadata, tensors)
    reader = gguf.GGUFReader(path)
    for key, kinds in KINDS.items():
        assert [kind.name for kind in reader.fields[key].types] == kinds
    for key, value in metadata.items():
        expected = value.value if isinstance(value, Typed) else value
        if expected != []:  # GGUFReader cannot say what an empty array holds
            assert reader.fields[key].contents() == expected
    for tensor, (name, (kind, shape, data)) in zip(reader.tensors, known.items(), strict=True):
        assert (tensor.name, tensor.tensor_type.name) == (name, kind.upper())
        assert tuple(reversed(tensor.shape.tolist())) == shape
        assert tensor.data.tobytes() == data.contiguous().view(torch.uint8).numpy().tobytes()
        assert tensor.data_offset % 32 == 0


def test_what_was_read_can_be_written_again(tmp_path: Path) -> None:
    source = GgufSource.open(written(tmp_path / "a.gguf", {"general.architecture": "llama", "llama.block_count": 2}))
    tensors = [
        GgufTensor(info.name, info.dtype, info.shape, lambda name=info.name: [source.read(name)])  # type: ignore[misc]
        for info in source.tensors.values()
    ]
    write_gguf(tmp_path / "b.gguf", source.metadata, tensors)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_tensors_are_asked_for_one_after_the_other(tmp_path: Path) -> None:
    path, sizes = tmp_path / "a.gguf", []

    def pieces() -> list[torch.Tensor]:
        sizes.append(path.stat().st_size)
        return [torch.zeros(1 << 20)]

    write_gguf(path, {}, [GgufTensor(name, "F32", (1 << 20,), pieces) for name in "abc"])
    assert [size >> 20 for size in sizes] == [0, 4, 8]


def test_the_writer_imports_no_torch() -> None:
    code = "import sys, qcore.checkpoint.gguf_writer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, [one(), one()], "same name"),
        ({}, [one(dtype="q4_9")], "unknown type"),
        ({}, [one((2, 33), "q4_0")], "whole q4_0 blocks of 32"),
        ({}, [one((1, 1, 1, 1, 1))], "one to four dimensions"),
        ({}, [one(())], "one to four dimensions"),
        ({}, [one((0, 32))], "one to four dimensions"),
        ({}, [one(name="n" * 64)], "1 to 63 bytes"),
        ({}, [GgufTensor("a", "F32", (4,), lambda: [torch.zeros(3)])], "12 bytes; .* takes 16"),
        ({}, [GgufTensor("a", "F32", (4,), lambda: [torch.zeros(3)] * 2)], "24 bytes; .* takes 16"),
        ({"general.alignment": 24}, [], "power of two"),
        ({"general.alignment": "x"}, [], "power of two"),
        ({"a": []}, [], "no type"),
        ({"a": None}, [], "no type"),
        ({"a": ["x", 1]}, [], "no type"),
        ({"a": [[1]]}, [], "no type"),
        ({"a": 1 << 64}, [], "no type"),
        ({"a": [-1, 1 << 63]}, [], "no type"),
        ({"a": Typed("uint8", 256)}, [], "not of type uint8"),
        ({"a": Typed("string", 1)}, [], "not of type string"),
        ({"a": Typed("float16", 1.0)}, [], "unknown type"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    tmp_path: Path, metadata: dict[str, Any], tensors: list[GgufTensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "a.gguf", metadata, tensors)
