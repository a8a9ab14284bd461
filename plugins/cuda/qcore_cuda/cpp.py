"""Kernels in CUDA C++: the sources in native/, run on a GPU (NVRTC compiles them at the first call) or, thread by thread, on a CPU, and compiled for GPUs
that are not here.

A program is one entry point, `extern "C"`, made from the sources and a body that calls one of their templates.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from qcore.kernels.triton.program import Compiled
    from qcore.platform import Target
    from qcore_cuda.driver import Function

_NATIVE = Path(__file__).with_name("native")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class CppProgram:
    """name: of the entry. source: the file in native/ that it is made of. parameters: of the entry, in C++, pointers and ints. body: the call. threads, shared: of a
    block, and the bytes of shared memory that it asks for at a call. own: it has instructions of one architecture alone (`sm_90a`). resident: blocks that a multiprocessor
    is to hold at a time, for which the compiler keeps to fewer registers; 0: as it likes.
    Every kernel waits for those before it (native/device.cuh), so it may begin early."""

    name: str
    source: str
    parameters: str
    body: str
    threads: int
    shared: int = field(default=0, compare=False)
    own: bool = False
    resident: int = 0

    @classmethod
    def calling(
        cls, name: str, source: str, parameters: str, function: str, threads: int, resident: int = 0
    ) -> CppProgram:  # fmt: skip
        """An entry that gives its parameters to a function of the source."""
        given = ", ".join(part.split()[-1].lstrip("*") for part in parameters.split(","))
        return cls(name, source, parameters, f"{function}({given});", threads, resident=resident)

    def entry(self, head: str) -> str:
        return f'extern "C" {head} {self.name}({self.parameters}) {{ {self.body} }}\n'

    def compile(self, target: Target) -> Compiled:
        """Raises whatever the compiler does not take."""
        from qcore_cuda.nvrtc import compiled

        made = compiled(self.text(), target.architecture + "a" * self.own)
        return replace(made, shared=made.shared + self.shared)

    def text(self) -> str:
        """What NVRTC compiles."""
        bounds = f"{self.threads}, {self.resident}" if self.resident else self.threads
        head = f"__global__ void __launch_bounds__({bounds})"
        return "\n".join([_source("device.cuh"), _source(self.source), self.entry(head)])

    def run(self, grid: Grid, *arguments: torch.Tensor | int | None) -> None:
        """On the device of the first argument. None stands for a pointer that is not looked at."""
        first = arguments[0]
        assert isinstance(first, torch.Tensor)
        given = [first if argument is None else argument for argument in arguments]
        if first.is_cuda:
            with torch.cuda.device(first.device):
                _on_gpu(self, first.device)(grid, self.threads, self.shared, given)
        else:
            _on_cpu(self)(*grid, *(a if isinstance(a, int) else a.data_ptr() for a in given))


def _source(name: str) -> str:
    """A file of native/ with those that it includes in their places."""
    text = (_NATIVE / name).read_text().replace("#pragma once", "")
    return re.sub(r'#include "(.*)"', lambda found: _source(found[1]), text)


@cache
def _on_gpu(program: CppProgram, place: torch.device) -> Function:
    from qcore_cuda.driver import Function
    from qcore_cuda.nvrtc import machine_code

    major, minor = torch.cuda.get_device_capability(place)
    return Function(machine_code(program.text(), f"sm_{major}{minor}{'a' * program.own}"), program.name, place)


@cache
def _on_cpu(program: CppProgram) -> Callable[..., None]:
    """The same source on native/emulator.h. Raises Refused (missing-package) where no C++ compiler is."""
    names = [part.split()[-1].lstrip("*") for part in program.parameters.split(",")]
    text = "\n".join(
        [
            '#include "emulator.h"', "#define __global__", f'#include "{program.source}"', program.entry("void"),
            f'extern "C" void on_grid(int gx, int gy, int gz, {program.parameters}) {{',
            f"  emulated::run({{gx, gy, gz}}, {program.threads}, [&] {{ {program.name}({', '.join(names)}); }});", "}",
        ]
    )  # fmt: skip
    folder = Path(_folder().name)
    source, library = folder / f"{program.name}.cpp", folder / f"{program.name}.so"
    source.write_text(text)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{_NATIVE}", str(source), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refused(Refusal("missing-package", "missing-dep", program.name, "on a CPU it needs a C++ compiler, and there is none",
                              fix="Install g++, or run it on a GPU.")) from error  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[:2000])
    function = ctypes.CDLL(str(library)).on_grid
    kinds = [_POINTER if "*" in part else _INT for part in program.parameters.split(",")]
    function.argtypes, function.restype = [_INT, _INT, _INT, *kinds], None
    called: Callable[..., None] = function
    return called


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Kept for as long as the process lives."""
    return tempfile.TemporaryDirectory(prefix="qcore-cuda-")
