"""Memory on huge pages."""

from __future__ import annotations

import ctypes
import errno
import mmap

import pytest

from qcore import pages
from qcore.pages import fresh_bytes

HUGE = 2 << 20


@pytest.mark.parametrize("count", [0, 1, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE + 5])
def test_all_of_it_can_be_written(count: int) -> None:
    memory = fresh_bytes(count)
    assert memory.numel() == count and memory.is_contiguous()
    memory.fill_(7)
    assert int(memory.sum()) == 7 * count
    assert count < HUGE or memory.data_ptr() % HUGE == 0


def test_each_has_its_own() -> None:
    first, second = fresh_bytes(HUGE), fresh_bytes(HUGE)
    first.fill_(1)
    second.fill_(2)
    assert int(first.max()) == 1


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
def test_huge_pages_that_come_slowly_are_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = pages._Pace()
    monkeypatch.setattr(pages, "_PACE", pace)
    monkeypatch.setattr(pages, "_SLOW", -1.0)  # whatever it takes is too slow
    held = [fresh_bytes(4 * HUGE) for _ in range(2)]
    assert [small for _, _, small in pace.small] == [3 * HUGE, 4 * HUGE], "the first page was tried, and no other"
    assert pace.pause == pages._PAUSE - 7 * HUGE
    for memory in held:
        memory.fill_(7)
        assert int(memory.sum()) == 7 * 4 * HUGE
    del held[0], memory
    pages.promote_pages(wait=True)  # what went back to the system meanwhile is nobody's any more
    assert not pace.small and int(held[0].sum()) == 7 * 4 * HUGE
    monkeypatch.setattr(pages, "_SLOW", 60.0)
    pace.pause = 0
    fresh_bytes(4 * HUGE)
    assert not pace.small


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
@pytest.mark.parametrize(("fault", "asked"), [(0, 7), (errno.EAGAIN, 7), (errno.EINVAL, 1)])
def test_small_pages_are_put_on_huge_ones_one_by_one(fault: int, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are held, and no other; a fault of one page leaves the others their turn, and a system that does not know it is left alone."""
    calls = []

    def madvise(page: object, count: ctypes.c_size_t, advice: int) -> int:
        calls.append((ctypes.cast(page, ctypes.c_void_p).value, count.value, advice))  # type: ignore[arg-type]
        ctypes.set_errno(fault)
        return -1 if fault else 0

    monkeypatch.setattr(pages, "_PACE", pages._Pace())
    monkeypatch.setattr(pages, "_SLOW", -1.0)
    monkeypatch.setattr(ctypes, "CDLL", lambda *given, **how: type("Library", (), {"madvise": staticmethod(madvise)}))
    first, gone, second = (fresh_bytes(4 * HUGE) for _ in range(3))
    del gone
    pages.promote_pages(wait=True)
    wanted = [first.data_ptr() + HUGE * page for page in (1, 2, 3)] + [
        second.data_ptr() + HUGE * page for page in range(4)
    ]
    assert calls == [(place, HUGE, pages._MADV_COLLAPSE) for place in wanted[:asked]]
