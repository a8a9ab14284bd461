"""What NVIDIA's management library (NVML) says of this host's GPUs, in milliseconds and without a CUDA context.

Prototypes and numbers are those of nvml.h (NVML API Reference Guide); the library comes with the driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"

_TEXT = 96
"""Bytes that hold any name, UUID (NVML_DEVICE_UUID_V2_BUFFER_SIZE) or version."""


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


_unsigned, _int, _handle, _text = ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "nvmlInit_v2": (),
    "nvmlShutdown": (),
    "nvmlSystemGetDriverVersion": (_text, _unsigned),
    "nvmlSystemGetCudaDriverVersion_v2": (ctypes.POINTER(_int),),
    "nvmlDeviceGetCount_v2": (ctypes.POINTER(_unsigned),),
    "nvmlDeviceGetHandleByIndex_v2": (_unsigned, ctypes.POINTER(_handle)),
    "nvmlDeviceGetName": (_handle, _text, _unsigned),
    "nvmlDeviceGetUUID": (_handle, _text, _unsigned),
    "nvmlDeviceGetCudaComputeCapability": (_handle, ctypes.POINTER(_int), ctypes.POINTER(_int)),
    "nvmlDeviceGetMemoryInfo": (_handle, ctypes.POINTER(_Memory)),
    "nvmlDeviceGetMigMode": (_handle, ctypes.POINTER(_unsigned), ctypes.POINTER(_unsigned)),
}
"""Argument types; every function returns an nvmlReturn_t, which is 0 where it succeeded."""

_ERRORS = {
    3: "not supported",
    4: "no permission",
    9: "the driver is not loaded",
    12: "the library is not found",
    15: "the GPU has fallen off the bus",
    17: "the operating system blocks the GPU",
    18: "library and kernel module are of different driver versions; restart the host",
    999: "unknown",
}


class NvmlError(Exception):
    """NVML is absent or a call of it failed."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. capability: (major, minor). free: bytes. mig: it is cut into MIG instances, which are what CUDA then
    shows. What NVML does not tell is empty or None; fault says why nothing is known."""

    name: str = ""
    uuid: str = ""
    capability: tuple[int, int] | None = None
    free: int | None = None
    mig: bool = False
    fault: str = ""


@dataclass(frozen=True)
class Facts:
    """driver: its version. cuda: the newest CUDA that it runs, (major, minor). gpus: in the order of the PCI bus."""

    driver: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()


def probe(library: str = LIBRARY) -> Facts:
    """Asks the library of this name or path. Raises NvmlError."""
    with _opened(library) as nvml:
        count = _unsigned()
        nvml.call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return Facts(
            driver=nvml.text("nvmlSystemGetDriverVersion"),
            cuda=_cuda_version(nvml),
            gpus=tuple(_gpu(nvml, index) for index in range(count.value)),
        )


class _Library:
    """The calls, each with its prototype."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name, arguments in _PROTOTYPES.items():
            function = getattr(library, name, None)  # older drivers lack some
            if function is not None:
                function.argtypes, function.restype = arguments, _int
                self._functions[name] = function

    def call(self, name: str, *arguments: Any) -> None:
        """Raises NvmlError where the library lacks the function or it fails."""
        if name not in self._functions:
            raise NvmlError(f"{name} is missing from the driver's library")
        code = self._functions[name](*arguments)
        if code:
            raise NvmlError(f"{name} failed: {_ERRORS.get(code, 'error')} ({code})")

    def tried(self, name: str, *arguments: Any) -> bool:
        """Whether the call succeeded."""
        try:
            self.call(name, *arguments)
        except NvmlError:
            return False
        return True

    def text(self, name: str, *arguments: Any) -> str:
        """The text that a function of (..., buffer, length) writes; empty where it fails."""
        buffer = ctypes.create_string_buffer(_TEXT)
        return buffer.value.decode(errors="replace") if self.tried(name, *arguments, buffer, _TEXT) else ""


@contextmanager
def _opened(name: str) -> Iterator[_Library]:
    try:
        library = _Library(ctypes.CDLL(name))
    except OSError as error:
        raise NvmlError(f"{name} cannot be loaded: {error}") from error
    library.call("nvmlInit_v2")
    try:
        yield library
    finally:
        library.tried("nvmlShutdown")


def _cuda_version(nvml: _Library) -> tuple[int, int] | None:
    """NVML writes 12.4 as 12040."""
    version = _int()
    if not nvml.tried("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _gpu(nvml: _Library, index: int) -> Gpu:
    handle = _handle()
    try:
        nvml.call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
    except NvmlError as error:
        return Gpu(fault=str(error))
    major, minor, mig, pending, memory = _int(), _int(), _unsigned(), _unsigned(), _Memory()
    known = nvml.tried("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    measured = nvml.tried("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    divisible = nvml.tried("nvmlDeviceGetMigMode", handle, ctypes.byref(mig), ctypes.byref(pending))
    return Gpu(
        name=nvml.text("nvmlDeviceGetName", handle),
        uuid=nvml.text("nvmlDeviceGetUUID", handle),
        capability=(major.value, minor.value) if known else None,
        free=int(memory.free) if measured else None,
        mig=divisible and mig.value == 1,
    )
