"""torchax made ready: torch's device `jax`, whose tensors are arrays of jax's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@cache
def start() -> None:
    """From now on torch has a device `jax`, in this process. Raises ImportError where torchax is not installed."""
    with _absent_overloads():
        import torchax

        environment = torchax.default_env()
    _numbers_go_anywhere(environment)
    _tensors_are_copied()
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


def _numbers_go_anywhere(environment: Any) -> None:
    """torch lets tensors of one number on the CPU meet those of any device, and makes such ones of plain numbers. torchax 0.0.13 makes them on its own device, where
    they meet no tensor of the CPU."""
    environment.config.allow_mixed_math_with_scalar_tensor = True
    dispatch = environment.dispatch

    def dispatched(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.promote_types.default:  # of types alone
            return func(*args)
        own = (kwargs or {}).get("device") or "cpu"
        if func is torch.ops.aten.scalar_tensor.default and torch.device(own).type == "cpu":
            return func(*args, **(kwargs or {}))
        return dispatch(func, types, args, kwargs)

    environment.dispatch = dispatched


def _tensors_are_copied() -> None:
    """copy.deepcopy of torchax 0.0.13's tensors fails. jax's arrays are never written to: a tensor of its own with the same one is a copy."""
    from torchax.tensor import Tensor

    def copied(tensor: Any, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(tensor), Tensor(tensor._elem, tensor._env, tensor.requires_grad))

    Tensor.__deepcopy__ = copied
