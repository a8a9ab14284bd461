"""The native library: found, loaded, and registered with torch as `torch.ops.qcore_cpu`.

It is built with this package where a C++ compiler is there. Where it is not, or the processor has none of the instruction
sets that it knows, `status` says so and other kernels run.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qcore")

ISA_VARIABLE = "QCORE_CPU_ISA"
"""Environment variable that names the instruction set to use: one of `Status.available`."""


@dataclass(frozen=True)
class Status:
    """What there is to run. isa: the instruction set that kernels use, empty where there is none. available: those that this
    processor has, the best first. fault: why there is none."""

    isa: str
    available: tuple[str, ...]
    fault: str = ""


@cache
def library_path() -> Path | None:
    """Where the library is; None where it was not built."""
    spec = importlib.util.find_spec("qcore_cpu._native")
    return Path(spec.origin) if spec is not None and spec.origin else None


@cache
def load() -> ctypes.CDLL | None:
    """The library, without torch; None where it was not built."""
    path = library_path()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    for function in (library.qcore_isa, library.qcore_isas, library.qcore_sources, library.qcore_register):
        function.restype = ctypes.c_char_p
    for function in (library.qcore_pack_codes, library.qcore_pack_cells):
        function.restype = None
    return library


def sources() -> str:
    """A digest of the sources beside this file, as CMakeLists.txt makes it."""
    paths = sorted(Path(__file__).with_name("native").iterdir())
    hashes = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in paths)
    return hashlib.sha256(hashes.encode()).hexdigest()


@cache
def status() -> Status:
    """The instruction set in use. Imports no torch."""
    library = load()
    if library is None:
        return Status("", (), "not built: no C++ compiler was there when the package was installed")
    if library.qcore_sources().decode() != sources():
        return Status("", (), "built from other sources than are here: install the package again")
    isa, available = library.qcore_isa().decode(), tuple(library.qcore_isas().decode().split())
    wanted = os.environ.get(ISA_VARIABLE, "")
    if isa:
        return Status(isa, available)
    if wanted and available:
        return Status("", available, f"{ISA_VARIABLE}={wanted} is none of {' '.join(available)}")
    return Status("", available, "this processor has neither AVX2 nor AVX-512")


@cache
def register() -> ctypes.CDLL:
    """The library with its operators in torch. Raises RuntimeError where they cannot be had."""
    import torch

    library, found = load(), status()
    if library is None or not found.isa:
        raise RuntimeError(f"qcore_cpu's native kernels: {found.fault}")
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    fault = library.qcore_register(str(torch_library).encode())
    if fault is not None:
        raise RuntimeError(f"qcore_cpu's native kernels: {fault.decode()}")
    if not library.qcore_has_threads():
        log.warning("qcore_cpu: torch's OpenMP runtime was not found; the native kernels run on one thread")

    _register_meta()
    return library


@cache
def _register_meta() -> torch.library.Library:
    """What the operators give for tensors without memory. The operators are withdrawn with the object. (register_fake would look for the module
    that it is called from among the sources of all that are imported, which takes 20 ms.)"""
    import torch

    meta = torch.library.Library("qcore_cpu", "IMPL", "Meta")

    def linear(x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], rows)

    def look_up(tokens: torch.Tensor, weight: torch.Tensor, columns: int) -> torch.Tensor:
        return tokens.new_empty(*tokens.shape, columns, dtype=torch.float32)

    meta.impl("linear", linear)
    meta.impl("look_up", look_up)
    return meta
