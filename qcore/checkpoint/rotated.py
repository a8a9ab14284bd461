"""The tensors of a checkpoint whose hidden states are rotated, each rotated when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.source import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch

    from qcore.algorithms.hadamard import Hadamard


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor: of a weight W [.., N, K], whose inputs are scaled by a norm's gain g, R^T W diag(g) C; of a bias b [.., N], b C.

    rows, columns: R and C; none are the identity. gain: the name of the norm's weight w; g = w + offset. transposed: the weight is stored as [.., K, N].
    value: the tensor is a norm's weight, and becomes this number. wide: it becomes float32, whatever it was.
    """

    rows: Hadamard | None = None
    columns: Hadamard | None = None
    gain: str = ""
    offset: float = 0.0
    transposed: bool = False
    value: float | None = None
    wide: bool = True

    def of(self, tensor: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """weight: the norm's, where there is one. float32, of a norm's weight its own dtype."""
        import torch

        if self.value is not None:
            return torch.full_like(tensor, self.value)
        found = tensor.to(torch.float32)
        found = found.mT if self.transposed else found
        if weight is not None:
            found = found * (weight.to(torch.float32) + self.offset)
        if self.columns is not None:
            found = self.columns.turn(found)
        if self.rows is not None:
            found = self.rows.turn(found.mT).mT
        return (found.mT if self.transposed else found).contiguous()


class RotatedSource:
    """A TensorSource of another one's tensors, some of them changed. copies: names of further tensors, and what each is a copy of before it is changed."""

    def __init__(self, source: TensorSource, changes: Mapping[str, Change], copies: Mapping[str, str]) -> None:
        self.path = source.path
        self.metadata: Mapping[str, Any] = source.metadata
        self._source, self._changes, self._copies = source, changes, copies
        whole = {**source.tensors, **{name: replace(source.tensors[of], name=name) for name, of in copies.items()}}
        self.tensors: Mapping[str, TensorInfo] = {name: self._info(info) for name, info in whole.items()}

    def read(self, name: str) -> torch.Tensor:
        held = self._source.read(self._copies.get(name, name))
        change = self._changes.get(name)
        if change is None:
            return held
        found = change.of(held, self._source.read(change.gain) if change.gain else None)
        return found if change.wide else found.to(held.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def _info(self, info: TensorInfo) -> TensorInfo:
        change = self._changes.get(info.name)
        if change is None or change.value is not None or not change.wide:
            return info
        return replace(info, dtype="F32", nbytes=4 * math.prod(info.shape))
