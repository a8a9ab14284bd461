"""Memory on huge pages: touching pages of 4 KiB for the first time takes four times as long as reading a file into them, and walking
over many of them slows kernels down by a tenth."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_HUGE_PAGE = 2 << 20


def huge_pages(count: int) -> tuple[mmap.mmap, int]:
    """Memory that goes back to the system as soon as nothing holds it, and where in it a huge page begins, with `count` bytes from there on, on
    as many huge pages as they fill where the system gives any. Raises OSError where there is no such memory."""
    import torch

    memory = mmap.mmap(-1, count + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, first, count // _HUGE_PAGE * _HUGE_PAGE)
    return memory, first


def fresh_bytes(count: int) -> torch.Tensor:
    """uint8 [count] of unknown values, from 2 MiB on at a huge page. Raises OSError and, torch's word for it, RuntimeError where there is no such
    memory."""
    import torch

    if count < _HUGE_PAGE:
        return torch.empty(count, dtype=torch.uint8)
    memory, first = huge_pages(count)
    return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=first)
