"""Memory on huge pages, where the system gives them quickly.

Walking over many pages of 4 KiB slows kernels down by a tenth to a third, and touching each for the first time takes four times as long as reading a
file into it. A huge page takes a sixth of that; but systems that compact memory for it first, and virtual machines whose host took idle memory back,
can take five times as long instead.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_HUGE_PAGE = 2 << 20
_SLOW = 1e-3
"""Seconds: small pages for as much memory come in two thirds of that."""
_PAUSE = 64 << 20
"""Bytes that come on small pages behind a huge one that was slow: trying again costs a fifth of what they do."""
_MADV_COLLAPSE = 25
_OF_ONE = (errno.EAGAIN, errno.EBUSY, errno.ENOMEM)
"""Faults of one page that others need not have."""


class _Pace:
    """Whether huge pages are asked for, and what came on small ones instead."""

    def __init__(self) -> None:
        self.pause = 0
        self.small: list[tuple[weakref.ref[mmap.mmap], int, int]] = []

    def touch(self, memory: mmap.mmap, first: int, count: int) -> None:
        """Touches huge pages for the first time, as long as they are quick; the others are left to be touched as small ones."""
        place, end = first, first + count
        while place < end and self.pause <= 0:
            began = perf_counter()
            memory[place] = 0
            place += _HUGE_PAGE
            if perf_counter() - began > _SLOW:
                self.pause = _PAUSE
        if place < end:
            memory.madvise(mmap.MADV_NOHUGEPAGE, place, end - place)
            self.pause -= end - place
            self.small.append((weakref.ref(memory), place, end - place))

    def taken(self) -> list[tuple[weakref.ref[mmap.mmap], int, int]]:
        """What came on small pages since this was asked, huge ones being wanted there from now on."""
        small, self.small = self.small, []
        for reference, place, count in small:
            if (memory := reference()) is not None:
                memory.madvise(mmap.MADV_HUGEPAGE, place, count)
        return small


def _collapse(small: list[tuple[weakref.ref[mmap.mmap], int, int]]) -> None:
    """Puts small pages on huge ones, one after the other, where the system does that (Linux 6.1); others wait for the system to do it by itself."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # which lets Python's other threads go on, unlike mmap's
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone
    for reference, place, count in small:
        for at in range(place, place + count, _HUGE_PAGE):
            if (memory := reference()) is None:
                break
            page = ctypes.byref((ctypes.c_char * _HUGE_PAGE).from_buffer(memory, at))
            failed = madvise(page, ctypes.c_size_t(_HUGE_PAGE), _MADV_COLLAPSE)
            del memory, page
            if failed and ctypes.get_errno() not in _OF_ONE:
                return


_PACE = _Pace()


def huge_pages(count: int) -> tuple[mmap.mmap, int]:
    """Memory that goes back to the system as soon as nothing holds it, and where in it a huge page begins, with `count` bytes from there on, on
    as many huge pages as they fill where the system gives any quickly. Raises OSError where there is no such memory."""
    import torch

    memory = mmap.mmap(-1, count + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            whole = count // _HUGE_PAGE * _HUGE_PAGE
            memory.madvise(mmap.MADV_HUGEPAGE, first, whole)
            _PACE.touch(memory, first, whole)
    return memory, first


def promote_pages(*, wait: bool = False) -> None:
    """Puts on huge pages, meanwhile and with the least priority, what came on small ones because huge ones were slow. wait: until it is done."""
    if small := _PACE.taken():
        thread = threading.Thread(target=_collapse, args=(small,), name="qcore-pages", daemon=True)
        thread.start()
        if wait:
            thread.join()


def fresh_bytes(count: int) -> torch.Tensor:
    """uint8 [count] of unknown values, from 2 MiB on at a huge page. Raises OSError and, torch's word for it, RuntimeError where there is no such
    memory."""
    import torch

    if count < _HUGE_PAGE:
        return torch.empty(count, dtype=torch.uint8)
    memory, first = huge_pages(count)
    return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=first)
