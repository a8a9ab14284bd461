"""What goes from one block to the next, on the disk: float32 [samples, tokens, hidden], written and read one sample at a time.

Format: a safetensors file with one tensor, `states`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch

from qcore.checkpoint.safetensors import SafetensorsSource
from qcore.checkpoint.writer import writing

_NAME = "states"


class StatesWriter:
    """Raises Refused (cannot-write). The file has its name once all of it is on the disk."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.partial = path, path.with_suffix(".partial")
        size = 4 * shape[0] * shape[1] * shape[2]
        header = json.dumps({_NAME: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        with writing(path):
            self._file = self.partial.open("wb")
            self._file.write(len(header).to_bytes(8, "little") + header)

    def __enter__(self) -> StatesWriter:
        return self

    def add(self, states: torch.Tensor) -> None:
        """[tokens, hidden]."""
        with writing(self.path):
            self._file.write(states.detach().to(torch.float32).contiguous().numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.path):
                    self._file.flush()
                    os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if kind is None:
            with writing(self.path):
                self.partial.rename(self.path)


class States:
    """Those of a file, [1, tokens, hidden] of each sample. Raises Refused where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._source = SafetensorsSource.open(path)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, tokens, hidden."""
        samples, tokens, hidden = self._source.tensors[_NAME].shape
        return samples, tokens, hidden

    def __len__(self) -> int:
        return self._source.tensors[_NAME].shape[0]

    def __getitem__(self, sample: int) -> torch.Tensor:
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        return self._source.read_rows(_NAME, sample, sample + 1)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[sample] for sample in range(len(self)))

    def parts(self, size: int, without: Container[int] = ()) -> Iterator[Iterable[torch.Tensor]]:
        """So many samples in each, but for the last; those that are named are left out."""
        samples = [sample for sample in range(len(self)) if sample not in without]
        return (_Part(self, samples[start : start + size]) for start in range(0, len(samples), size))


class _Part:
    """Some samples of a file. They are read one at a time; another process is sent all of them, for it may not have the file."""

    def __init__(self, states: States, samples: Sequence[int]) -> None:
        self._states, self._samples = states, samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self._states[sample] for sample in self._samples)

    def __reduce__(self) -> tuple[type[list[torch.Tensor]], tuple[list[torch.Tensor]]]:
        return list, (list(self),)
