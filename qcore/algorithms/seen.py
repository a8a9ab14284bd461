"""What a calibrated algorithm knows of a layer: the inputs that the layer had while the model read the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ROWS = 2
"""For each column: with more, an estimate of the inputs' second moments needs no steadying."""


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

    def steadied(self) -> Seen:
        """With a Gram matrix drawn towards a multiple of the identity where there are few rows for the columns, as experts have that few tokens reach, so far as their sizes are
        likely to be chance: of inputs without any order, weights are then rounded to nearest.

        Source: oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero, arXiv 0907.4698, formula 23).
        """
        columns = len(self.gram)
        if not 0 < self.rows < _ROWS * columns:
            return self
        trace = float(self.gram.trace())
        squares, mean = float(self.gram.square().sum(dtype=torch.float64)), trace / columns
        above = (1 - 2 / columns) * squares + trace**2
        below = (self.rows + 1 - 2 / columns) * (squares - trace * mean)
        part = min(above / below, 1.0) if below > 0 else 1.0
        gram = self.gram * (1 - part)
        gram.diagonal().add_(part * mean)
        return Seen(gram, self.largest, self.rows)

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
