"""Kernels launched by the driver's own library (cuda.h), on torch's stream and in its context.

torch's launcher of such kernels is private, and needs CUDA's headers on the host; this needs the driver alone.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_INVALID_CONTEXT = 201
_MOST_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
_STATIC_SHARED = 1
"""CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES"""
_PROGRAMMATIC = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"""
_OVERLAPS_FROM = (9, 0)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute; its value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class Function:
    """One entry of a module, on one device. From Hopper on it may begin before the kernel ahead of it ends, and must wait for that itself (griddepcontrol). Raises RuntimeError with the driver's words where the module is not for this device."""

    def __init__(self, code: bytes, name: str, place: torch.device) -> None:
        self.place = place
        self._function = ctypes.c_void_p()
        self._module = ctypes.c_void_p()
        with torch.cuda.device(place):
            torch.cuda.current_stream()  # torch's context is there from here on
            _attach(place)
            _checked(_driver().cuModuleLoadData(ctypes.byref(self._module), code))
            _checked(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
            static, most = ctypes.c_int(), limits(place)[1]
            _checked(_driver().cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, self._function))
            _checked(_driver().cuFuncSetAttribute(self._function, _MOST_DYNAMIC_SHARED, most - static.value))
        overlap = torch.cuda.get_device_capability(place) >= _OVERLAPS_FROM
        self._attribute = _Attribute(_PROGRAMMATIC, b"", (1,))
        self._count = 1 if overlap else 0

    def __call__(
        self, grid: tuple[int, int, int], threads: int, shared: int, arguments: list[torch.Tensor | int]
    ) -> None:
        """On torch's current stream of the device. shared: bytes of shared memory that a block asks for."""
        held = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        stream = torch.cuda.current_stream(self.place).cuda_stream
        config = _Config(
            grid, (threads, 1, 1), shared, stream, ctypes.pointer(self._attribute) if self._count else None, self._count
        )  # fmt: skip
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        if status == _INVALID_CONTEXT:  # the first call of a thread that torch has not used yet
            _attach(self.place)
            status = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        _checked(status)


@cache
def limits(place: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(place)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _attach(place: torch.device) -> None:
    """Makes torch's context, the device's primary one, this thread's."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _checked(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if context.value is None:
        _checked(
            _driver().cuDeviceGet(
                ctypes.byref(device), torch.cuda.current_device() if place.index is None else place.index
            )
        )
        _checked(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _checked(_driver().cuCtxSetCurrent(context))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(status: int) -> None:
    if status:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(words))
        raise RuntimeError(f"CUDA's driver: {(words.value or b'unknown error').decode()} ({status})")
