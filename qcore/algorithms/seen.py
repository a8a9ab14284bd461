"""What a calibrated algorithm knows of a layer: the inputs that the layer had while the model read the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seen:
    """gram: float32 [K, K], the sum of x x^T over all rows x of the input. largest: float32 [K], the largest magnitude of each column. rows: how many there were."""

    gram: torch.Tensor
    largest: torch.Tensor
    rows: int

    @classmethod
    def nothing(cls, columns: int) -> Seen:
        """Of a layer that no text reached: all columns count alike, so that its weight is rounded to nearest."""
        return cls(torch.eye(columns), torch.zeros(columns), 0)

    def error(self, weight: torch.Tensor, made: torch.Tensor) -> float:
        """How far the layer's outputs are from its own, for both weights [N, K] on these inputs: the squared distance in parts of the squared outputs."""
        apart, whole = made.to(torch.float32) - weight, weight.to(torch.float32)
        distance, size = ((part @ self.gram).mul_(part).sum(dtype=torch.float64) for part in (apart, whole))
        return float(distance / size) if size else 0.0


class Watch:
    """Adds up what a layer of K columns sees."""

    def __init__(self, columns: int) -> None:
        self.gram = torch.zeros(columns, columns)
        self.largest = torch.zeros(columns)
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """x: [..., K]."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not len(rows):
            return
        self.gram.addmm_(rows.T, rows)
        torch.maximum(self.largest, rows.abs().amax(0), out=self.largest)
        self.rows += len(rows)

    def seen(self) -> Seen:
        return Seen(self.gram, self.largest, self.rows)
