"""A bounded reader of safetensors: one file, or shards with an index.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}},
then the data; offsets count from its first byte, and tensors cover it without overlap or hole
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.checkpoint import limits
from qcore.checkpoint.json_file import parse_json, read_json
from qcore.checkpoint.pread import FileState, read_tensor_bytes, unreadable, wrong_magic
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
"""Bits of one element and torch's name; types narrower than a byte are read as flat uint8."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class SafetensorsSource:
    """An opened checkpoint of one or more safetensors files."""

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
        """A .safetensors file, or a folder with one of them or with shards. Raises Refused."""
        files, weight_map = _files(path)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, Any] = {}
        states = {}
        for file in files:
            states[file] = FileState.of(file)
            found, extra = _read_header(file, states[file].size)
            for name, info in found.items():
                if name in tensors:
                    raise bad_file("duplicate", "two shards hold the same tensor", file=file, tensor=name,
                                   found=tensors[name].file.name, expected="each tensor in one shard")  # fmt: skip
                tensors[name] = info
            metadata |= extra
        if weight_map is not None:
            _check_index(path, weight_map, tensors)
        return cls(path, tensors, metadata, states)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in torch's dtype and its own shape."""
        info = self.tensors[name]
        return self._typed(info, info.offset, info.nbytes, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first dimension."""
        info = self.tensors[name]
        stop = min(stop, info.shape[0])
        row = info.nbytes // info.shape[0]
        return self._typed(info, info.offset + start * row, (stop - start) * row, (stop - start, *info.shape[1:]))

    def _typed(self, info: TensorInfo, offset: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        data = read_tensor_bytes(info.file, self._states[info.file], offset, nbytes)
        kind = DTYPES[info.dtype][1]
        return data.view(getattr(torch, kind)).reshape(shape) if kind else data


def _files(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files of the checkpoint and, where there is an index, which tensor it says lies where."""
    if path.is_file():
        return (_siblings(path), None) if _SHARD.fullmatch(path.name) else ([path], None)
    indexes = sorted(path.glob("*.safetensors.index.json"))
    single = sorted(path.glob("*.safetensors"))
    preferred = path / "model.safetensors.index.json"
    if preferred in indexes or len(indexes) == 1:
        return _indexed(path, preferred if preferred in indexes else indexes[0])
    if (path / "model.safetensors") in single:
        return [path / "model.safetensors"], None
    if len(single) == 1:
        return _files(single[0])
    if single and len({match[1] for file in single if (match := _SHARD.fullmatch(file.name))}) == 1:
        return _siblings(next(file for file in single if _SHARD.fullmatch(file.name))), None
    raise Refused(
        Refusal("ambiguous-checkpoint", "usage", str(path), "the folder holds several safetensors files and no index",
                f"found {', '.join(file.name for file in single[:6])}", "Name the one you mean, or add its index.")
    )  # fmt: skip


def _siblings(path: Path) -> list[Path]:
    """All shards of the set that `path` is one of."""
    match = _SHARD.fullmatch(path.name)
    assert match is not None
    count = int(match[3])
    if not 1 <= count <= limits.SHARDS:
        raise bad_file("limit-exceeded", "the shard count is not a real one", file=path, field="name", found=count)
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.safetensors") for i in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise _missing_shard(path, file.name)
    return files


def _indexed(folder: Path, index: Path) -> tuple[list[Path], Mapping[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad_file("bad-field", "the index maps no tensors", file=index, field="weight_map",
                       found=type(weight_map).__name__, expected="an object of tensor names and shard names")  # fmt: skip
    shards: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise bad_file("bad-field", "a shard's name is not text", file=index, tensor=name, field="weight_map",
                           found=shard, expected="a file name")  # fmt: skip
        if shard not in shards:
            shards[shard] = _safe_shard(folder, index, name, shard)
    if len(shards) > limits.SHARDS:
        raise bad_file("limit-exceeded", "the index names too many shards", file=index, found=len(shards))
    return sorted(shards.values()), weight_map


def _safe_shard(folder: Path, index: Path, tensor: str, shard: str) -> Path:
    """The shard's path, once it is known to lie in the folder (or, by a link, in the same Hugging Face cache)."""
    if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
        raise bad_file("shard-unsafe", "a shard's name leads out of the folder", file=index, tensor=tensor,
                       field="weight_map", found=shard, expected="a plain file name")  # fmt: skip
    file = folder / shard
    if not file.is_file():
        raise _missing_shard(index, shard, tensor)
    target, home = file.resolve(), folder.resolve()
    # models--org--name/snapshots/<revision>/<file> links to models--org--name/blobs/<hash>
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if target.parent != home and target.parent != cache:
        raise bad_file("shard-unsafe", "a shard is a link that leads out of the folder", file=index, tensor=tensor,
                       field="weight_map", found=str(target), expected=f"a file in {home}")  # fmt: skip
    return file


def _missing_shard(named_by: Path, shard: str, tensor: str | None = None) -> Refused:
    return bad_file("shard-missing", f"the shard {shard} is not there", file=named_by, tensor=tensor, found="no such file",
                    expected=shard, fix=f"Download {shard} again into the same folder.")  # fmt: skip


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor where the index says. Its total_size is not checked: tools count tied weights differently."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise bad_file("index-inconsistent", "the index names a tensor that the shard does not hold", file=folder,
                           tensor=name, field="weight_map", found="absent", expected=shard)  # fmt: skip
    for name, info in tensors.items():
        if name not in weight_map:
            raise bad_file("index-inconsistent", "a shard holds a tensor that the index does not name", file=info.file,
                           tensor=name, field="weight_map", found="absent from the index")  # fmt: skip


def _read_header(file: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """One file's tensors and metadata, validated."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > max(size - 8, 0) or length > limits.SAFETENSORS_HEADER or length < 2:
                raise _bad_length(file, start, stream.read(32), length, size)
            text = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from error
    header = parse_json(text, file=file, field="header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad_file("bad-field", "metadata maps text to text", file=file, field="__metadata__", found=metadata,
                       expected="an object of strings")  # fmt: skip
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


def _bad_length(file: Path, start: bytes, more: bytes, length: int, size: int) -> Refused:
    known = wrong_magic(file, start + more, "a safetensors header length")
    if size < 8 or not known.refusal.reason.startswith("it does not begin"):
        return known
    if length > limits.SAFETENSORS_HEADER:
        return bad_file("limit-exceeded", "the header is longer than any real one", file=file, field="header length",
                        found=length, expected=f"at most {limits.SAFETENSORS_HEADER}")  # fmt: skip
    return bad_file("truncated", "the header does not fit into the file", file=file, field="header length",
                    found=length, expected=f"2 to {size - 8}")  # fmt: skip


def _tensor(file: Path, name: str, entry: object, begin: int, data: int) -> TensorInfo:
    def no(code: str, field: str, reason: str, found: object, expected: object) -> Refused:
        return bad_file(code, reason, file=file, tensor=name, field=field, found=found, expected=expected)

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
