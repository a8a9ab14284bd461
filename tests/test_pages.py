"""Memory on huge pages, and memory that is used again."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest

from qcore import pages
from qcore.pages import fresh_bytes, lent_bytes, memory_used_again

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


def test_lent_memory_is_used_again_and_goes_back_to_the_system() -> None:
    with memory_used_again():
        first = lent_bytes(HUGE)
        place, part = first.data_ptr(), first[5:9].view(2, 2)
        part.fill_(3)
        del first
        other = lent_bytes(HUGE)
        assert other.data_ptr() != place, "a view still holds the first"
        other.fill_(4)
        assert int(part.sum()) == 12
        del part
        assert lent_bytes(HUGE // 4).data_ptr() != place, "it is far too large for that"
        again = lent_bytes(HUGE - 4096)
        assert again.data_ptr() == place and again.numel() == HUGE - 4096
        del again
        for _ in range(pages._KEPT):
            lent_bytes(HUGE // 8)
        assert all(kept.data_ptr() != place for _, kept in pages._POOL.free), "nobody wanted it"
    assert not pages._POOL.free
    del other
    assert not pages._POOL.free, "nothing is kept behind the end"


def test_no_memory_is_lent_twice_at_once() -> None:
    def use(value: int) -> bool:
        right = True
        for _ in range(200):
            memory = lent_bytes(pages._LENT + 1000 * value).fill_(value)
            right &= bool((memory == value).all())
        return right

    with memory_used_again(), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(4)))
