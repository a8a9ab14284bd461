"""A stand-in for Neuron's chips, for hosts without their software: torch's operators on the CPU, of which kernels may call those alone that are known to become
operations of the chip, with its types and its numbers (qcore_neuron/operators.py).

It is Trn2 with the compiler's setting for e4m3: a number above 240 raises. What the compiler makes of a program, and the chip of sums, is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcore.discovery import registry
from qcore.testing.watch import watch
from qcore_neuron.operators import ATEN
from qcore_neuron.sdk import sdk

TYPES = frozenset(
    {
        torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, torch.int32, torch.bool
    }
)  # fmt: skip
"""qcore_neuron.operators.TYPES, as torch names them."""
_LARGEST = 240.0


class Chip(TorchDispatchMode):
    """Inside of it, torch's operators take what Neuron's take. Raises ValueError where one is called with something else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name not in ATEN:
            with self:  # without gradients, operators that are made of others come whole
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        _check(name in ATEN, f"{func} is not known to become an operation of the chip")
        _check(not str(func).endswith(".dtype"), f"{func} is left to the CPU")
        compared = name in ("eq", "ge") and not str(func).endswith(".Tensor")
        _check(not compared, f"{func} compares in float64, which the chip lacks")
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs, out)):
            cut = name == "_to_copy" and tensor is not out and tensor.dtype == torch.int64  # tokens, to 32 bits
            _check(cut or tensor.dtype in TYPES, f"{func}: the chip has no {tensor.dtype}")
        if name == "mm":
            _check(all(one.is_floating_point() for one in _tensors(args)), f"{func}: the chip multiplies no integers")
        for tensor in _tensors((args, out)):
            if tensor.dtype == torch.float8_e4m3fn and name == "_to_copy":
                _check(not bool((tensor.to(torch.float32).abs() > _LARGEST).any()), "the chip has no e4m3 above 240")
        return out


@cache
def load() -> None:
    """From now on this plugin's kernels run on the CPU as on the chip. Raises RuntimeError where AWS's software is, which has one."""
    if sdk() is not None:
        raise RuntimeError("torch-neuronx is installed: nothing stands in for its devices")
    watch((kernel.load() for kernel, plugin in registry().kernels if plugin == "neuron"), chip)


def chip(given: tuple[object, ...]) -> AbstractContextManager[Any]:
    """What kernels run inside of, where these are not on another device."""
    make: Any = Chip  # torch does not say what its modes' methods take
    return make() if all(one.device.type == "cpu" for one in _tensors(given)) else nullcontext()


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"Neuron would not take this: {what}")
