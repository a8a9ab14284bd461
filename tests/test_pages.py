"""Memory on huge pages."""

from __future__ import annotations

import pytest

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
