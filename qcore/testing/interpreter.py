"""Triton's interpreter, in which kernels for GPUs take tensors of the CPU. This module is imported before Triton is, in a process that compiles
nothing."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_cast = interpreter.InterpreterBuilder.cast_impl
_create_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot_of_floats(self: Any, a: Any, b: Any, sums: Any, *others: Any) -> Any:
    """Numbers of bfloat16 are held as their bits; Triton 3.6 to 3.9 multiply the bits."""
    if a.dtype.scalar != tl.bfloat16:
        return _create_dot(self, a, b, sums, *others)
    left, right = ((given.data.astype(np.uint32) << 16).view(np.float32) for given in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right).astype(sums.data.dtype) + sums.data, sums.dtype.scalar)


def _cast_to_nearest(self: Any, source: Any, kind: Any) -> Any:
    """From float32 to bfloat16 GPUs round to nearest, ties to even; Triton 3.6 to 3.9 cut off."""
    if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, kind)
    bits = np.asarray(source.data, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), kind.scalar)


def _multiply_and_add(self: Any, a: Any, b: Any, c: Any) -> Any:
    """GPUs round once; Triton 3.6 to 3.9 round the product too. A product of float32 is exact in float64."""
    wide = [np.asarray(given.data, np.float64) for given in (a, b, c)]
    return interpreter.TensorHandle((wide[0] * wide[1] + wide[2]).astype(a.data.dtype), a.dtype.scalar)


class _Patched:
    """What a launch has put in the place of Triton's language, each of its modules once. Triton 3.6 to 3.9 do it again for every function that a program calls, which
    takes more than a third of the time."""

    def __init__(self) -> None:
        self.scopes: dict[int, Any] = {}

    def __call__(self, function: Any) -> _Patched:
        used = {id(found) for found in function.__globals__.values() if found is tl or found is tl.core}
        if not used or not used <= self.scopes.keys():
            scope = _patch(function)
            self.scopes |= dict.fromkeys(used, scope)
        return self

    def restore(self) -> None:
        """Triton calls it where a launch ends."""
        for scope in reversed(self.scopes.values()):
            scope.restore()
        self.scopes.clear()


interpreter._patch_lang = _Patched()
interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest
interpreter.InterpreterBuilder.create_fma = _multiply_and_add
interpreter.InterpreterBuilder.create_dot = _create_dot_of_floats
