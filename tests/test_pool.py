"""Memory that is used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from qcore import pool
from qcore.pool import lent_bytes, memory_used_again

SIZE = 2 << 20


def test_lent_memory_is_used_again_and_goes_back_to_the_system() -> None:
    with memory_used_again():
        first = lent_bytes(SIZE)
        place, part = first.data_ptr(), first[5:9].view(2, 2)
        part.fill_(3)
        del first
        other = lent_bytes(SIZE)
        assert other.data_ptr() != place, "a view still holds the first"
        other.fill_(4)
        assert int(part.sum()) == 12
        del part
        assert lent_bytes(SIZE // 4).data_ptr() != place, "it is far too large for that"
        again = lent_bytes(SIZE - 4096)
        assert again.data_ptr() == place and again.numel() == SIZE - 4096
        del again
        for _ in range(pool._KEPT):
            lent_bytes(SIZE // 8)
        assert all(kept.data_ptr() != place for _, kept in pool._POOL.free), "nobody wanted it"
    assert not pool._POOL.free
    del other
    assert not pool._POOL.free, "nothing is kept behind the end"


def test_no_memory_is_lent_twice_at_once() -> None:
    def use(value: int) -> bool:
        right = True
        for _ in range(200):
            memory = lent_bytes(pool._LENT + 1000 * value).fill_(value)
            right &= bool((memory == value).all())
        return right

    with memory_used_again(), ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(4)))
