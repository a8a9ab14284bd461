"""Two ways of running one layer, timed beside each other on the GPU that is here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qcore.accuracy import worst_error

ROWS = (1, 16, 64, 512)
"""Rows of x: one token, some of several texts, and a prompt."""
_LAPS = 15


@dataclass(frozen=True)
class Lap:
    """Seconds of both for so many rows of x, and how far the first's answer is from the second's (qcore.accuracy.worst_error)."""

    rows: int
    ours: float
    theirs: float
    apart: float

    def __str__(self) -> str:
        return f"{self.rows} rows in {self.ours * 1e6:.1f} us beside {self.theirs * 1e6:.1f}"


def race(
    ours: Callable[[torch.Tensor], torch.Tensor], theirs: Callable[[torch.Tensor], torch.Tensor], columns: int, place: str, dtype: torch.dtype
) -> list[Lap]:  # fmt: skip
    """Both with the same random x [M, columns], for each of ROWS."""
    laps = []
    for rows in ROWS:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(place, dtype)
        apart = worst_error(ours(x), theirs(x).cpu())  # which compiles both
        first, second = seconds([partial(ours, x), partial(theirs, x)], place)
        laps.append(Lap(rows, first, second, apart))
    return laps


def seconds(runs: Sequence[Callable[[], object]], place: str) -> list[float]:
    """The median time of each on the GPU, one after the other in turn. Before each the second cache is filled with something else, as other layers do in a
    model, in which time the host goes ahead."""
    with torch.cuda.device(place):
        cache = torch.empty(2 * _cache_bytes(), dtype=torch.uint8, device=place)
        events = [[[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in runs] for _ in range(_LAPS)]
        for run in runs:
            run()
        for lap in events:
            for run, (begin, end) in zip(runs, lap, strict=True):
                cache.zero_()
                begin.record()
                run()
                end.record()
        torch.cuda.synchronize()
    return [statistics.median(lap[i][0].elapsed_time(lap[i][1]) for lap in events) / 1e3 for i in range(len(runs))]


def _cache_bytes() -> int:
    found: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return found
