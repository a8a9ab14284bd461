"""What a calibrated algorithm knows of a layer: the inputs that the layer had while the model read the calibration text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qcore.algorithms.symmetric import Symmetric

_FIRST = 0.5
"""Of a text's tokens: as many times its first token counts in the sum. Most heads attend to it from nearly everywhere (attention sinks, arXiv 2309.17453), so that an error of its
keys and values is one of all tokens; among hundreds of rows it would be lost."""
_OF_A_CALL = 16
_OF_ALL = 512
_ROWS = 2
"""For each column: with more, an estimate of the inputs' second moments needs no steadying."""


@dataclass(frozen=True)
class Seen:
    """sums: [K, K], of x x^T over all rows x of the input, of which the first of a text counts as many. rows: how many there were. largest, typical: float32 [K], the largest magnitude of each column, and the mean
    of its magnitudes. sample: float32 [S, K], some of the rows, at most 512."""

    sums: Symmetric
    rows: int
    largest: torch.Tensor
    typical: torch.Tensor
    sample: torch.Tensor

    @classmethod
    def nothing(cls, columns: int) -> Seen:
        """Of a layer that no text reached: all columns count alike, so that its weight is rounded to nearest."""
        nothing = torch.zeros(columns)
        return cls(Symmetric.identity(columns), 0, nothing, nothing, torch.zeros(0, columns))

    @property
    def gram(self) -> torch.Tensor:
        """`sums` as float32 [K, K], made anew."""
        return self.sums.whole()

    def steadied(self) -> Seen:
        """With a Gram matrix drawn towards a multiple of the identity where there are few rows for the columns, as experts have that few tokens reach, so far as their sizes are
        likely to be chance: of inputs without any order, weights are then rounded to nearest.

        Source: oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero, arXiv 0907.4698, formula 23).
        """
        columns = len(self.sums)
        if not 0 < self.rows < _ROWS * columns:
            return self
        squares, trace = self.sums.squares(), float(self.sums.diagonal().sum())
        mean = trace / columns
        above = (1 - 2 / columns) * squares + trace**2
        below = (self.rows + 1 - 2 / columns) * (squares - trace * mean)
        part = min(above / below, 1.0) if below > 0 else 1.0
        return replace(self, sums=self.sums.times(1 - part).plus(part * mean))

    def error(self, weight: torch.Tensor, made: torch.Tensor) -> float:
        """How far the layer's outputs are from its own, for both weights [N, K] on these inputs: the squared distance in parts of the squared outputs."""
        distance, size = (
            self.sums.size_of(part) for part in (made.to(torch.float32) - weight, weight.to(torch.float32))
        )
        return distance / size if size else 0.0

    def divided(self, factors: torch.Tensor) -> Seen:
        """Of inputs whose columns are divided by factors [K], all positive."""
        return Seen(
            self.sums.divided(factors), self.rows, self.largest / factors, self.typical / factors, self.sample / factors
        )


class Watch:
    """Adds up what a layer of K columns sees."""

    def __init__(self, columns: int) -> None:
        self._sums = Symmetric.zeros(columns)
        self.rows = 0
        self._largest, self._sum = torch.zeros(columns), torch.zeros(columns)
        self._sample: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """x: [texts, tokens, K], or rows [N, K] that are of no known place."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not len(rows):
            return
        more = max(_FIRST * x.shape[1] - 1, 0.0) if x.dim() == 3 else 0.0
        self._sums.add(rows)
        if more:
            self._sums.add(x.detach()[:, 0].to(torch.float32), more)
        sizes = rows.abs()
        torch.maximum(self._largest, sizes.amax(0), out=self._largest)
        self._sum += sizes.sum(0)
        self.rows += len(rows)
        if len(self._sample) * _OF_A_CALL < _OF_ALL:
            self._sample.append(rows[:: -(-len(rows) // _OF_A_CALL)].clone())

    def join(self, other: Watch) -> None:
        """Adds what another saw after it."""
        self._sums.join(other._sums)
        torch.maximum(self._largest, other._largest, out=self._largest)
        self._sum += other._sum
        self.rows += other.rows
        self._sample = (self._sample + other._sample)[: _OF_ALL // _OF_A_CALL]

    def seen(self) -> Seen:
        sample = torch.cat(self._sample) if self._sample else torch.zeros(0, len(self._sums))
        return Seen(self._sums, self.rows, self._largest, self._sum / max(self.rows, 1), sample)
