"""NVIDIA's runtime compiler (NVRTC, of CUDA 12, which knows Volta to Blackwell) as a library: CUDA C++ compiled for GPUs that need not be here.

Prototypes are those of nvrtc.h; the library is of the wheel `nvidia-cuda-nvrtc-cu12`, or where torch's CUDA builds have it, or where the loader finds it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from qcore.kernels.triton.program import Compiled

_NAMES = ("libnvrtc.so.12", "libnvrtc.so.13")
_PRODUCT = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|dp4a)[\w.:]*")
"""Instructions in PTX that make many products at once."""


def compiled(source: str, architecture: str) -> Compiled:
    """What became of one entry point on an architecture (`sm_90`); its matrix instruction is `dp4a` where that makes the products. Raises Refused
    (missing-package), and RuntimeError with the compiler's words."""
    from triton.backends import nvidia  # its wheel has the tool that reads machine code

    from qcore.kernels.triton.program import Compiled

    machine, text = _compile(source, architecture, "CUBIN", "PTX")
    found = _PRODUCT.findall(text.decode())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", said)}
    return Compiled(max(set(found), key=found.count) if found else "", usage["REG"], usage["STACK"], usage["SHARED"])


def machine_code(source: str, architecture: str) -> bytes:
    """For one architecture (`sm_90`). Raises as `compiled` does."""
    return _compile(source, architecture, "CUBIN")[0]


def _compile(source: str, architecture: str, *kinds: str) -> list[bytes]:
    library, program = _library(), ctypes.c_void_p()
    _checked(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    try:
        if library.nvrtcCompileProgram(program, 2, options):
            raise RuntimeError(_text(program, "ProgramLog").decode()[:2000])
        return [_text(program, kind) for kind in kinds]
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    _checked(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _checked(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            if path.name in _NAMES:
                for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(path))
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Refused(Refusal("missing-package", "missing-dep", "NVRTC", "kernels in CUDA C++ are compiled by it, and it is not installed",
                          fix="pip install 'nvidia-cuda-nvrtc-cu12>=12.9,<13'"))  # fmt: skip


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC answered {status}")
