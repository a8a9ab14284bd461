"""Symmetric matrices in little more than half of their room, and with a factor in the other half."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch

DAMPING = 0.01
"""What is added to the diagonal of sums before they are divided by, in parts of its mean."""
_MOST_DAMPING = 1e6
"""Of a matrix of finite numbers less is enough."""
_STEP = 256
"""Rows of a panel."""
_BLOCK = 128
"""Columns of a factor that are found together."""


class Symmetric:
    """Float32 [K, K], of which each panel has some rows, from their part of the diagonal on."""

    def __init__(self, panels: list[torch.Tensor]) -> None:
        self.panels = panels

    @classmethod
    def zeros(cls, size: int) -> Symmetric:
        return cls([torch.zeros(min(_STEP, size - start), size - start) for start in range(0, size, _STEP)])

    @classmethod
    def of(cls, whole: torch.Tensor) -> Symmetric:
        """float32 [K, K]; what is below the diagonal is not looked at, but in its panel."""
        size = len(whole)
        return cls([whole[start : start + _STEP, start:].clone() for start in range(0, size, _STEP)])

    @classmethod
    def identity(cls, size: int) -> Symmetric:
        return cls.zeros(size).plus(1.0)

    def __len__(self) -> int:
        return self.panels[0].shape[1] if self.panels else 0

    def placed(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Panels, and the rows that they are."""
        start = 0
        for panel in self.panels:
            yield slice(start, start + len(panel)), panel
            start += len(panel)

    def add(self, rows: torch.Tensor, times: float = 1.0) -> None:
        """Adds x x^T of all rows x [.., K], so many times."""
        for own, panel in self.placed():
            panel.addmm_(rows[:, own].T, rows[:, own.start :], alpha=times)

    def join(self, other: Symmetric) -> None:
        for own, more in zip(self.panels, other.panels, strict=True):
            own += more

    def plus(self, more: float) -> Symmetric:
        """With more on the diagonal, in place."""
        for panel in self.panels:
            panel.diagonal().add_(more)
        return self

    def times(self, part: float) -> Symmetric:
        return Symmetric([panel * part for panel in self.panels])

    def divided(self, factors: torch.Tensor) -> Symmetric:
        """Rows and columns, by factors [K]."""
        return Symmetric([(panel / factors[own, None]).div_(factors[own.start :]) for own, panel in self.placed()])

    def diagonal(self) -> torch.Tensor:
        return torch.cat([panel.diagonal() for panel in self.panels])

    def squares(self) -> float:
        """The sum of all squared."""
        return sum(
            2 * float(panel.square().sum(dtype=torch.float64)) - float(panel[:, : len(panel)].square().sum(dtype=torch.float64))
            for panel in self.panels
        )  # fmt: skip

    def size_of(self, x: torch.Tensor) -> float:
        """The sum of x G x^T over rows x [N, K]."""
        total = 0.0
        for own, panel in self.placed():
            along = x[:, own] @ panel
            along[:, len(panel) :].mul_(2)
            total += float(along.mul_(x[:, own.start :]).sum(dtype=torch.float64))
        return total

    def whole(self) -> torch.Tensor:
        found = torch.empty(len(self), len(self))
        for own, panel in self.placed():
            found[own, own.start :] = panel
            found[own.stop :, own] = panel[:, len(panel) :].T
        return found


class Factored:
    """G [K, K], positive definite, and the upper triangular U of G = U U^T, in the room of one: G below the diagonal, U from it on. diagonal: G's. The matrix that it is made of
    has no room from `with` to its end.

    Where rounding leaves G without a factor, more is added to its diagonal; columns of zeros stand alone in it.
    """

    def __init__(self, matrix: Symmetric, order: torch.Tensor) -> None:
        """order: [K], of the matrix's columns. Raises ValueError where it is not finite."""
        self._matrix, self._order = matrix, order
        self._both, self._own = matrix.whole(), matrix.diagonal()[order]
        matrix.panels.clear()
        _reorder(self._both, order)
        self.diagonal = damped(self._own)
        mean, more = float(self._own.mean()), DAMPING
        while not self._factored():
            if more > _MOST_DAMPING:
                raise ValueError("what the layer sees is not finite")
            self.diagonal += mean * more
            more *= 2

    def __enter__(self) -> Factored:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.diagonal = self._own
        self._mirror()
        _reorder(self._both, self._order.argsort())
        self._matrix.panels += Symmetric.of(self._both).panels
        del self._both

    def corner(self, part: slice) -> torch.Tensor:
        """U[part, part]."""
        return self._both[part, part].triu()

    def above(self, part: slice) -> torch.Tensor:
        """U's rows before those of `part`, in its columns."""
        return self._both[: part.start, part]

    def within(self, part: slice) -> torch.Tensor:
        """G[part, part]."""
        below = self._both[part, part].tril(-1)
        below += below.T.clone()
        below.diagonal().copy_(self.diagonal[part])
        return below

    def inside(self, group: slice, x: torch.Tensor) -> torch.Tensor:
        """G[group, group] @ x, [g, N]."""
        found = torch.zeros_like(x)
        for part in blocks_of(group):
            own = slice(part.start - group.start, part.stop - group.start)
            found[own.start : own.stop].addmm_(self.within(part), x[own])
            found[own.stop :].addmm_(self._both[part.stop : group.stop, part], x[own])
            found[: own.start].addmm_(self._both[part, group.start : part.start].T, x[own])
        return found

    def add_product(self, into: torch.Tensor, part: slice, x: torch.Tensor, times: float = 1.0) -> None:
        """G[:, part] @ x, so many times, into [K, N]."""
        into[: part.start].addmm_(self._both[part, : part.start].T, x, alpha=times)
        into[part].addmm_(self.within(part), x, alpha=times)
        into[part.stop :].addmm_(self._both[part.stop :, part], x, alpha=times)

    def _mirror(self) -> None:
        """Above the diagonal, and on it, is what is below, and `diagonal`."""
        both = self._both
        for block in blocks_of(slice(0, len(both))):
            both[block, block] = self.within(block)
            both[block, block.stop :] = both[block.stop :, block].T

    def _factored(self) -> bool:
        """From the last columns on."""
        both = self._both
        self._mirror()
        for block in reversed(blocks_of(slice(0, len(both)))):
            left = torch.addmm(both[: block.stop, block], both[: block.stop, block.stop :], both[block, block.stop :].T, alpha=-1)  # fmt: skip
            lower, failed = torch.linalg.cholesky_ex(left[block.start :].flip(0, 1))
            if failed:
                return False
            corner = lower.flip(0, 1)
            both[: block.start, block] = torch.linalg.solve_triangular(corner.T, left[: block.start], upper=False, left=False)  # fmt: skip
            both[block, block].tril_(-1).add_(corner)
        return True


def _reorder(whole: torch.Tensor, order: torch.Tensor) -> None:
    """Rows and columns of [K, K], in place."""
    for rows in whole.split(_STEP):
        rows.copy_(rows[:, order])
    for columns in whole.split(_STEP, 1):
        columns.copy_(columns[order])


def damped(diagonal: torch.Tensor) -> torch.Tensor:
    """[K], the diagonal of a matrix that is to be divided by; columns that were never seen stand alone in it."""
    return diagonal + DAMPING * diagonal.mean() + (diagonal == 0)


def blocks_of(group: slice) -> list[slice]:
    """Of some columns, those whose changes reach the others together."""
    return [slice(start, min(start + _BLOCK, group.stop)) for start in range(group.start, group.stop, _BLOCK)]
