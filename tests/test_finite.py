"""Numbers that are not finite are seen in every type, wherever they stand."""

from __future__ import annotations

import pytest
import torch

from qcore.checkpoint.finite import all_finite

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")])
def test_one_among_many(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 17, 99):
        values = torch.linspace(-3, 3, 100)
        values[place] = bad
        assert not all_finite(values.to(dtype)) and not all_finite(values.to(dtype).view(10, 10).t())


@pytest.mark.parametrize("dtype", TYPES)
def test_the_greatest_numbers_are_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    values = torch.tensor([most, -most, 0.0, -0.0, torch.finfo(dtype).tiny], dtype=torch.float64).to(dtype)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(values[0])


def test_scales_inside_of_blocks() -> None:
    """Every ninth of the words, where they stand."""
    words = torch.full((50, 9), 0x7C00, dtype=torch.int16)
    words[:, 4] = 0x3C00
    assert all_finite(words[:, 4:5].view(torch.float16))
    words[49, 4] = 0x7C00
    assert not all_finite(words[:, 4:5].view(torch.float16))


@pytest.mark.parametrize("shape", [(200_000,), (100, 2000), (1, 200_000), (100_000, 2)])
def test_the_last_of_very_many(shape: tuple[int, ...]) -> None:
    """More than are looked at at once."""
    values = torch.zeros(shape, dtype=torch.float16)
    assert all_finite(values)
    values.view(-1)[-1] = float("nan")
    assert not all_finite(values)
