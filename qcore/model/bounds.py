"""What a config may make transformers build: no buffer of gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch

_ELEMENTS = 1 << 28
"""Elements of a tensor that is made for a model's skeleton: the masks of some have tens of millions."""
_BY_VALUE, _BY_SHAPE = (torch.arange,), (torch.zeros, torch.ones, torch.full)


def check_size(func: Any, args: tuple[Any, ...]) -> None:
    """Raises ValueError before a tensor is made that is larger than any real model's buffer."""
    sizes = [size for size in _flat(args) if isinstance(size, int)]
    count = prod(sizes) if func in _BY_SHAPE else max(sizes, default=0) if func in _BY_VALUE else 0
    if count > _ELEMENTS:
        raise ValueError(f"a buffer of {count} elements")


def _flat(values: Any) -> Iterator[object]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value
