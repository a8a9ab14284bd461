"""Memory that is used again: touching fresh memory for the first time takes longer than reading a file into it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING

from qcore.pages import fresh_bytes

if TYPE_CHECKING:
    import torch

_LENT = 128 << 10
"""Bytes from which on what is lent is kept: the C library uses smaller pieces again by itself."""
_KEPT = 16
"""Loans after which what was not lent again goes back to the system."""


class _Pool:
    """Memory that tensors have left. Threads may lend from it at once."""

    def __init__(self) -> None:
        self.free: list[tuple[int, torch.Tensor]] = []  # and the number of the loan after which it came back
        self.loans = self.scopes = 0
        self.lock = RLock()  # what is collected while it is held takes it too

    def lend(self, count: int) -> torch.Tensor:
        import torch

        with self.lock:
            self.loans += 1
            self.free = [(since, kept) for since, kept in self.free if self.loans - since < _KEPT]
            most = count + count // 4  # what is lent may be kept for good
            fitting = [kept for _, kept in self.free if count <= kept.numel() <= most]
            found = min(fitting, key=lambda kept: kept.numel(), default=None)
            self.free = [(since, kept) for since, kept in self.free if kept is not found]
        memory = fresh_bytes(count) if found is None else found
        held = memory.numpy()[:count]  # which the tensor holds, and all that share its storage
        weakref.finalize(held, self.take_back, memory).atexit = False
        return torch.from_numpy(held)

    def take_back(self, memory: torch.Tensor) -> None:
        with self.lock:
            if self.scopes:
                self.free.append((self.loans, memory))


_POOL = _Pool()


def lent_bytes(count: int) -> torch.Tensor:
    """uint8 [count] of unknown values; within `memory_used_again`, memory that a tensor has left where there is some of about this size.
    Raises as `fresh_bytes` does."""
    return _POOL.lend(count) if _POOL.scopes and count >= _LENT else fresh_bytes(count)


@contextmanager
def memory_used_again() -> Iterator[None]:
    """Within it, what `lent_bytes` gave is lent again as soon as nothing holds it."""
    with _POOL.lock:
        _POOL.scopes += 1
    try:
        yield
    finally:
        with _POOL.lock:
            _POOL.scopes -= 1
            if not _POOL.scopes:
                _POOL.free = []
