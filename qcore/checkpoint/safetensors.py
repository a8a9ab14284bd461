"""A bounded reader of safetensors: one file, or shards with an index.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}},
then the data; offsets count from its first byte, and tensors cover it without overlap or hole
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.checkpoint import limits
from qcore.checkpoint.json_file import parse_json, read_json
from qcore.checkpoint.pread import FileState, opened, read_pieces, read_tensor_bytes, row_span, wrong_magic
from qcore.checkpoint.shards import gather, safe_shard, shard_of
from qcore.checkpoint.source import TensorInfo
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F4": (4, ""),
}
"""Bits of one element and torch's name; types narrower than a byte, which have none, are read as uint8."""


class SafetensorsSource:
    """An opened checkpoint of one or more safetensors files; `metadata` is that of all files together.

    A TensorSource: nothing stays open or mapped between calls.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, Any],
        states: Mapping[Path, FileState],
    ) -> None:
        self.path, self.tensors, self.metadata = path, tensors, metadata
        self._states = states

    @classmethod
    def open(cls, path: Path) -> SafetensorsSource:
        """A .safetensors file, or a folder with one of them or with shards, with or without an index.

        Of a folder's files the same are taken as transformers takes: model.safetensors, else those of
        model.safetensors.index.json, else the only ones there are. Raises Refused.
        """
        index = _index(path) if path.is_dir() else None
        weight_map = _weight_map(index) if index else {}
        files = _indexed(index, weight_map) if index else _files(path)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        states = {}
        for file in files:
            with opened(file) as (descriptor, states[file]):
                found, extra = _read_header(file, descriptor, states[file].size)
            for name, info in found.items():
                if name in tensors:
                    raise bad_file("duplicate", "two shards hold the same tensor", file=file, tensor=name,
                                   found=tensors[name].file.name, expected="each tensor in one shard")  # fmt: skip
                tensors[name] = info
            metadata |= extra
        if index:
            _check_index(index, weight_map, tensors)
        return cls(path, tensors, metadata, states)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in torch's dtype and its own shape; F4 and F6 as uint8 [rows, bytes per row].

        Raises Refused where the file has changed; KeyError for an unknown name.
        """
        info = self.tensors[name]
        return self._typed(info, info.offset, info.nbytes, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first dimension, as `read` would give them."""
        info = self.tensors[name]
        return self._typed(info, *row_span(info, start, stop))

    def _typed(self, info: TensorInfo, offset: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        bits, kind = DTYPES[info.dtype]
        row = (info.shape[-1] if info.shape else 1) * bits
        if row % 8:
            raise bad_file("bad-shape", "its rows are not whole bytes", file=info.file, tensor=info.name,
                           found=f"{info.dtype} {list(info.shape)}")  # fmt: skip
        data = read_tensor_bytes(info.file, self._states[info.file], offset, nbytes)
        if not kind:
            return data.view(prod(shape[:-1]), row // 8)
        return data.view(getattr(torch, kind)).reshape(shape)


def _index(folder: Path) -> Path | None:
    """The folder's shard index, if its tensors are to be found through one."""
    preferred = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return None
    if preferred.exists():
        return preferred
    others = sorted(folder.glob("*.safetensors.index.json"))
    return others[0] if len(others) == 1 else None


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint without an index."""
    if not path.is_dir():
        return gather(path)
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    found = sorted(path.glob("*.safetensors"))
    shards = {file: shard_of(file) for file in found}
    if len({(shard.stem, shard.count) if shard else file for file, shard in shards.items()}) == 1:
        return gather(found[0])
    if found:
        raise Refused(
            Refusal("ambiguous-checkpoint", "usage", str(path), "the folder holds several safetensors files and no index",
                    f"found {', '.join(file.name for file in found[:6])}", "Name the one you mean, or add its index.",
                    str(path))
        )  # fmt: skip
    raise Refused(
        Refusal("not-a-checkpoint", "bad-file", str(path), "the folder holds no safetensors files", "found none",
                "Name the folder that holds the weights.", str(path))
    )  # fmt: skip


def _weight_map(index: Path) -> dict[str, str]:
    """Which tensor lies in which shard, as the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad_file("bad-field", "the index maps no tensors", file=index, field="weight_map",
                       found=reprlib.repr(weight_map), expected="an object of tensor names and shard names")  # fmt: skip
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise bad_file("bad-field", "a shard's name is not text", file=index, tensor=name, field="weight_map",
                           found=reprlib.repr(shard), expected="a file name")  # fmt: skip
    return weight_map


def _indexed(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The shards that the index names, once it is known that they may be opened."""
    first_use: dict[str, str] = {}
    for name, shard in weight_map.items():
        first_use.setdefault(shard, name)
    if len(first_use) > limits.SHARDS:
        raise bad_file("limit-exceeded", "the index names too many shards", file=index, field="weight_map",
                       found=len(first_use), expected=f"at most {limits.SHARDS}")  # fmt: skip
    return [safe_shard(index.parent, shard, named_by=index, tensor=name) for shard, name in sorted(first_use.items())]


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor is where the index says, and nowhere else.

    metadata.total_size is not looked at: tools count tied weights differently, and no size is ever taken from it.
    """
    for name, shard in weight_map.items():
        held_by = tensors[name].file.name if name in tensors else "none"
        if held_by != shard:
            raise bad_file("index-inconsistent", "the index names a tensor that the shard does not hold", file=index,
                           tensor=name, field="weight_map", found=held_by, expected=shard)  # fmt: skip
    for name, info in tensors.items():
        if name not in weight_map:
            raise bad_file("index-inconsistent", "a shard holds a tensor that the index does not name", file=index,
                           tensor=name, field="weight_map", found=info.file.name, expected="every tensor named")  # fmt: skip


def _read_header(file: Path, descriptor: int, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """One file's tensors and metadata, validated."""
    start = b"".join(read_pieces(file, descriptor, 0, min(size, 40)))
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(size - 8, limits.SAFETENSORS_HEADER):
        raise _bad_length(file, start, length, size)
    if start[8:9] != b"{":  # the format allows no space before it
        raise bad_file("bad-json", "the header is not a JSON object", file=file, field="header", found=start[8:],
                       expected="{")  # fmt: skip
    header = parse_json(read_pieces(file, descriptor, 8, length), file=file, field="header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad_file("bad-field", "metadata maps text to text", file=file, field="__metadata__",
                       found=reprlib.repr(metadata), expected="an object of strings")  # fmt: skip
    begin = 8 + length
    tensors = {name: _tensor(file, name, entry, begin, size - begin) for name, entry in header.items()}
    end = begin
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            code, reason = (
                ("overlap", "two tensors claim the same bytes")
                if info.offset < end
                else ("hole", "bytes before it belong to no tensor")
            )
            raise bad_file(code, reason, file=file, tensor=info.name, field="data_offsets", found=info.offset - begin,
                           expected=end - begin)  # fmt: skip
        end += info.nbytes
    if end != size:
        raise bad_file("hole", "bytes after the last tensor belong to none", file=file, field="data_offsets",
                       found=f"{size - end} bytes left", expected="0")  # fmt: skip
    return tensors, metadata


def _bad_length(file: Path, start: bytes, length: int, size: int) -> Refused:
    if len(start) < 8 or start[8:9] not in (b"", b"{"):
        return wrong_magic(file, start, "a safetensors header length and {")
    if length > limits.SAFETENSORS_HEADER:
        return bad_file("limit-exceeded", "the header is longer than any real one", file=file, field="header length",
                        found=length, expected=f"at most {limits.SAFETENSORS_HEADER}")  # fmt: skip
    return bad_file("truncated", "the header does not fit into the file", file=file, field="header length",
                    found=length, expected=f"2 to {size - 8}")  # fmt: skip


def _tensor(file: Path, name: str, entry: object, begin: int, data: int) -> TensorInfo:
    def no(code: str, field: str, reason: str, found: object, expected: object) -> Refused:
        return bad_file(code, reason, file=file, tensor=name, field=field, found=reprlib.repr(found), expected=expected)

    if not name or not name.isprintable():
        raise no("bad-text", "name", "a tensor's name is not printable text", name, "a parameter's name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise no("bad-field", "entry", "a tensor's entry has other keys", entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise no("bad-dtype", "dtype", "the data type is unknown", dtype, ", ".join(DTYPES))
    if not isinstance(shape, list) or len(shape) > limits.DIMENSIONS or not all(_is_size(s) for s in shape):
        raise no(
            "bad-shape", "shape", "a shape is a short list of sizes", shape, f"at most {limits.DIMENSIONS} sizes >= 0"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise no("bad-field", "data_offsets", "offsets are two numbers", offsets, "[begin, end]")
    count = 1
    for size in shape:
        count *= size
    bits = count * DTYPES[dtype][0]
    if not offsets[0] <= offsets[1] <= data:
        raise no("truncated", "data_offsets", "the tensor lies outside the file", offsets, f"within {data} bytes")
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise no("bad-shape", "shape", "shape and bytes disagree", f"{offsets[1] - offsets[0]} bytes",
                 f"{bits / 8:g} bytes for {dtype} {shape}")  # fmt: skip
    return TensorInfo(name, dtype, tuple(shape), file, begin + offsets[0], bits // 8)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
