"""A bounded reader of GGUF v2 and v3, little- and big-endian, one file or shards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.gguf_header import Header
from qcore.checkpoint.pread import FileState, opened, read_tensor_bytes, row_span
from qcore.checkpoint.shards import gather, shard_of
from qcore.checkpoint.source import TensorInfo
from qcore.refusal import bad_file

if TYPE_CHECKING:
    import torch

_TORCH = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


class GgufSource:
    """An opened GGUF checkpoint. `metadata` is the first shard's, with what only later shards say.

    A TensorSource: nothing stays open or mapped between calls.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any],
        states: Mapping[Path, FileState], big_endian: frozenset[Path],
    ) -> None:  # fmt: skip
        self.path, self.tensors, self.metadata = path, tensors, metadata
        self._states, self._big_endian = states, big_endian

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """A .gguf file; the other shards of a split one are found beside it. Raises Refused."""
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, Any] = {}
        states: dict[Path, FileState] = {}
        big_endian = set()
        for file in gather(path):
            with opened(file) as (descriptor, states[file]):
                header = Header(file, descriptor, states[file].size)
            _check_split(file, header.metadata)
            for name, info in header.tensors.items():
                if name in tensors:
                    raise bad_file("duplicate", "two shards hold the same tensor", file=file, tensor=name,
                                   found=tensors[name].file.name, expected="each tensor in one shard")  # fmt: skip
                tensors[name] = info
            metadata = {**header.metadata, **metadata}
            if header.big_endian:
                big_endian.add(file)
        return cls(path, tensors, metadata, states, frozenset(big_endian))

    def read(self, name: str) -> torch.Tensor:
        """Plain types in torch's dtype and the tensor's shape; block types as uint8 [rows, bytes per row], where rows
        are those of all outer dimensions together.

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

        from qcore.blocks.dequantize import byteswap_blocks

        data = read_tensor_bytes(info.file, self._states[info.file], offset, nbytes)
        big_endian = info.file in self._big_endian
        block = BLOCK_TYPES.get(info.dtype.lower())
        if block is not None:
            rows = data.view(-1, shape[-1] // block.elements * block.nbytes)
            return byteswap_blocks(block.name, rows) if big_endian else rows
        dtype: torch.dtype = getattr(torch, _TORCH[info.dtype])
        if big_endian != (sys.byteorder == "big"):
            data = data.view(-1, dtype.itemsize).flip(1).reshape(-1)
        return data.view(dtype).reshape(shape)


def _check_split(file: Path, metadata: Mapping[str, Any]) -> None:
    """A shard's own account of its set (llama.cpp's split.no, from 0, and split.count) agrees with its name."""
    shard = shard_of(file)
    said = metadata.get("split.count")
    if shard is None:
        if type(said) is int and said > 1:  # shards that were joined again say 0
            raise bad_file("shard-missing", "its name does not tell where the other shards are", file=file,
                           field="split.count", found=file.name, expected=f"name-00001-of-{said:05d}.gguf",
                           fix="Give all shards the names back that they had.")  # fmt: skip
        return
    for field, expected in (("split.count", shard.count), ("split.no", shard.number - 1)):
        found = metadata.get(field, expected)
        if type(found) is not int or found != expected:
            raise bad_file("index-inconsistent", "the file's name and its header tell different shards", file=file,
                           field=field, found=found, expected=expected)  # fmt: skip
