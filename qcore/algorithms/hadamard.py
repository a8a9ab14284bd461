"""Randomized Hadamard matrices, by which a model's hidden states are rotated: outliers of a few columns spread over all of them.

R = diag(s) H / sqrt(n) of random signs s: orthogonal, and all its entries of one size. H is the Kronecker product of small matrices (so n x n numbers are never held):

    Sylvester's of a power of two, n = 2^k
    Paley's of n = q + 1 for a prime q of 3 mod 4, and of n = 2 (q + 1) for one of 1 mod 4 (Paley, On Orthogonal Matrices, 1933): 12, 20, 28, 36, 44, 60, ...
    where neither has the odd part of a width: a random orthogonal one of that, which spreads less evenly

Rotations of this kind are from QuIP# (arXiv 2402.04396) and QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

_LARGEST = 1024
"""Rows of a matrix of Paley's that is worth its products."""
_SYLVESTER = 64
"""Rows of a matrix of Sylvester's: two small products are quicker than one of all rows."""
_PIECE = 1 << 18
"""Numbers that are rotated at once, so that they stay in a processor's cache."""


@dataclass(frozen=True)
class Hadamard:
    """The rotation of vectors of `width` numbers, or of each `width` of longer ones. seed: of the signs."""

    width: int
    seed: int = 0

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x R: float32 [..., n], of n a multiple of the width."""
        out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        rows, turned = x.reshape(-1, self.width), out.view(-1, self.width)
        step = max(_PIECE // self.width, 1)
        for start in range(0, len(rows), step):
            part = (rows[start : start + step] * self._signs).view(-1, *map(len, self._factors))
            for factor in self._factors:  # each takes the first axis to the end: behind the last they are in order
                part = torch.tensordot(part, factor, ([1], [0]))
            turned[start : start + step] = part.reshape(-1, self.width)
        return out

    @cached_property
    def _signs(self) -> torch.Tensor:
        """float32 [width], with what the factors are to be divided by."""
        drawn = torch.randint(2, (self.width,), generator=torch.Generator().manual_seed(self.seed))
        sizes = [float(factor[0].square().sum()) for factor in self._factors]
        return (2 * drawn - 1).to(torch.float32) / math.sqrt(math.prod(sizes))

    @cached_property
    def _factors(self) -> list[torch.Tensor]:
        """float32 matrices with orthogonal rows of one size, whose Kronecker product is H."""
        odd = order = self.width // (self.width & -self.width)
        while self.width % order == 0 and order <= _LARGEST and (found := _paley(order)) is None:
            order *= 2
        if self.width % order or order > _LARGEST:
            order, found = odd, _orthogonal(odd)
        assert found is not None
        factors, left = [found], self.width // order
        while left > 1:
            factors.append(_sylvester(min(left, _SYLVESTER)))
            left //= len(factors[-1])
        return [factor.to(torch.float32) for factor in factors if len(factor) > 1]


def _sylvester(order: int) -> torch.Tensor:
    found, pair = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(found) < order:
        found = torch.kron(pair, found)
    return found


def _paley(order: int) -> torch.Tensor | None:
    """None where there is no such matrix."""
    if order == 1:
        return torch.ones(1, 1)
    if order % 4 == 0 and _prime(order - 1):
        return _bordered(order - 1, -1) + torch.eye(order)
    if order % 4 == 0 and _prime(order // 2 - 1) and order // 2 % 4 == 2:
        edge, middle = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(_bordered(order // 2 - 1, 1), edge) + torch.kron(torch.eye(order // 2), middle)
    return None


def _bordered(q: int, sign: int) -> torch.Tensor:
    """Whether the difference of two numbers is a square mod q (1, -1, of equal ones 0), below a row of ones and beside a column of `sign`: [q + 1, q + 1]."""
    numbers = torch.arange(q)
    squares = torch.full((q,), -1.0)
    squares[numbers**2 % q] = 1
    squares[0] = 0
    found = torch.zeros(q + 1, q + 1)
    found[0, 1:], found[1:, 0] = 1, sign
    found[1:, 1:] = squares[(numbers[:, None] - numbers) % q]
    return found


def _prime(number: int) -> bool:
    return number > 1 and all(number % part for part in range(2, math.isqrt(number) + 1))


def _orthogonal(order: int) -> torch.Tensor:
    """A random one, the same each time."""
    drawn = torch.randn(order, order, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    found: torch.Tensor = torch.linalg.qr(drawn)[0]
    return found
