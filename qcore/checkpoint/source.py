"""What every container offers: tensors by name, their headers at once, their bytes one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's header: where its bytes lie and what they are.

    dtype: a safetensors name (`F32`, `BF16`, `I32`, `F8_E4M3`, ...) or, in GGUF, ggml's type name (`F32`, `Q4_K`, ...).
    shape: outermost dimension first, in elements (so a GGUF weight reads [out_features, in_features]).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """First byte, counted from the beginning of the file."""
    nbytes: int


class TensorSource(Protocol):
    """An opened container. Headers are validated when it is opened; no weight is read before it is asked for.

    Reading copies into fresh memory with pread, so that no mapping of the file outlives the call (mapped pages would
    count as resident memory) and a file that changes underneath cannot crash the process.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor. Plain types come in torch's dtype and in `shape`; GGUF's block types come as uint8
        [rows, blocks x bytes per block], little-endian whatever the file's byte order."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first dimension, as `read` would give them."""
        ...
