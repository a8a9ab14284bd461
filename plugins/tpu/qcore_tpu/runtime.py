"""torchax made ready: torch's device `jax`, whose tensors are arrays of jax's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@cache
def start() -> None:
    """From now on torch has a device `jax`, in this process. Raises ImportError where torchax is not installed."""
    with _absent_overloads():
        import torchax

        torchax.enable_globally()


@contextmanager
def _absent_overloads() -> Iterator[None]:
    """torchax 0.0.13 names overloads by dimensions' names (`aten.prod.dim_Dimname`), which torch 2.13 has no more: while it is imported, each is a name that nothing
    calls."""
    from torch._ops import OpOverloadPacket

    found: Any = OpOverloadPacket.__getattr__

    def lenient(packet: Any, name: str) -> Any:
        try:
            return found(packet, name)
        except AttributeError:
            if "name" in name.lower() and not name.startswith("_"):
                return f"{packet}.{name}"
            raise

    OpOverloadPacket.__getattr__ = lenient  # type: ignore[method-assign]
    try:
        yield
    finally:
        OpOverloadPacket.__getattr__ = found  # type: ignore[method-assign]
