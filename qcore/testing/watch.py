"""Watching the kernels of a plugin on what stands in for their hardware: they alone compute inside of a mode of torch's, which may refuse what the hardware has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

Mode = Callable[[tuple[Any, ...]], AbstractContextManager[Any]]
"""The mode for a method that is called with these arguments."""
_ON_DEVICE = ("forward", "encode", "decode")
"""The methods of a qcore.kernel.LayerKernel that run on the device."""


def watch(kernels: Iterable[type], mode: Mode) -> None:
    """From now on these kernels run inside of the mode. (Hooks on all of torch's modules would do so too, and keep every model from its decoder.)"""
    for kernel in kernels:
        for name in _ON_DEVICE:
            method = getattr(kernel, name, None)
            if method is not None and not hasattr(method, "__wrapped__"):
                setattr(kernel, name, watched(method, mode))


def watched(method: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    """The same, inside of the mode."""

    @wraps(method)
    def run(*given: Any, **named: Any) -> Any:
        with mode(given):
            return method(*given, **named)

    return run
