"""The real package `bitblas` where there is no GPU: it imports and compiles for one, and what it compiles runs thread by thread on native/emulator.h.

A GPU is pretended to its TVM alone, which asks one for its sizes; libcuda, of which nothing is called, is made of nothing. The source of a program stays what
the package wrote, but for what C++ has no words for: instructions in PTX become calls of what the PTX ISA says of them.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import qcore_cuda

NATIVE = Path(qcore_cuda.__file__).with_name("native")
ARCHITECTURE = ["8.0"]
"""The compute capability that TVM is told."""


def missing() -> str:
    """Why the package cannot be tried here, or an empty string."""
    try:
        importlib.metadata.version("bitblas")
    except importlib.metadata.PackageNotFoundError:
        return "the package bitblas is not installed"
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None:
            return f"there is no {tool}, which compiles what the package writes"
    for part in ("cuda_runtime", "cuda_nvrtc"):
        if not _of_wheel(part):
            return (
                f"the package nvidia-{part.replace('_', '-')}-cu12 is not installed, which bitblas's TVM is linked to"
            )
    return ""


def _of_wheel(part: str) -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or () if spec else ()
    return [path for folder in folders for path in sorted(Path(folder, part, "lib").glob("lib*.so.12"))]


def pretend(folder: Path) -> None:
    """A GPU for the package's TVM. folder: where a libcuda may be written."""
    tvm = _package() / "3rdparty" / "tvm" / "python"
    libraries = [
        path for path in (_package() / "3rdparty").rglob("lib*.so") if re.match("libtvm|libtilelang", path.name)
    ]
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True
    ).stdout
    source = folder / "cuda.c"
    names = sorted(set(re.findall(r" U (cu[A-Z]\w+)", wanted)))
    source.write_text("\n".join(f"int {name}(void) {{ return 100; }}" for name in names))  # CUDA_ERROR_NO_DEVICE
    for name in ("libcuda.so.1", "libcuda.so"):
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o", str(folder / name)], check=True)  # fmt: skip
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    for part in ("cuda_runtime", "cuda_nvrtc"):
        for path in _of_wheel(part):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    os.environ["LIBRARY_PATH"] = f"{folder}:{os.environ.get('LIBRARY_PATH', '')}"
    os.environ["NVCC_APPEND_FLAGS"] = "-w"  # CUTLASS's own warnings
    before = list(sys.path)
    sys.path.insert(0, str(tvm))
    try:
        module = importlib.import_module("tvm")
    finally:
        sys.path[:] = before
    module.runtime.cuda = lambda number=0: SimpleNamespace(
        exist=True, max_shared_memory_per_block=48 << 10, multi_processor_count=108, warp_size=32,
        compute_version=ARCHITECTURE[0], device_type=2, device_id=number,
    )  # fmt: skip


def _package() -> Path:
    spec = importlib.util.find_spec("bitblas")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def on_cpu(source: str, folder: Path) -> ctypes.CDLL:
    """What the package hands to nvcc as a library for a CPU, with the same entries `init` and `call`."""
    text = re.sub(r"#include <tl_templates.*", "", source)
    text = re.sub(r"__global__ void __launch_bounds__\(\d+\)", "void", text)
    text = re.sub(r"extern __shared__ .*? (\w+)\[\];", r"unsigned char* \1 = shared_memory;", text)
    text = re.sub(r"cudaFuncSetAttribute\(.*?\);", "", text)
    text = re.sub(r"(\w+)<<<dim3\((.*)\), dim3\((\d+), 1, 1\), \d+, stream>>>\((.*)\);",
                  r"emulated::run({\2}, \3, [&] { \1(\4); });", text)  # fmt: skip
    text = _in_words(text)
    assert "asm" not in text and "<<<" not in text, text
    path, library = folder / "program.cpp", folder / "program.so"
    path.write_text(PRELUDE + text)
    # TVM's library has LLVM's conversions of float16 under the names of GCC's, which take their numbers in other registers.
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-static-libgcc", f"-I{NATIVE}", str(path), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


_ASM = re.compile(r'(?:__asm__ __volatile__|asm volatile)\s*\(\s*((?:"[^"]*"\s*)+):')


def _in_words(text: str) -> str:
    """Every instruction as a call: its name, then outputs and inputs as they stand."""
    while found := _ASM.search(text):
        end = _closing(text, found.end())
        operands = [_operand(part) for part in _parts(text[found.end() : end].replace("\n", " "))]
        said = "".join(re.findall(r'"([^"]*)"', found[1]))
        name = next(name for name, begins in INSTRUCTIONS.items() if begins(said))
        text = f"{text[: found.start()]}ptx_{name}({', '.join(operands)}){text[end + 1 :]}"
    return text


def _closing(text: str, start: int) -> int:
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise AssertionError("an instruction without an end")


def _parts(text: str) -> list[str]:
    """Operands: parted by commas, and outputs from inputs by a colon, outside of all brackets."""
    parts, depth, begun = [], 0, 0
    for place, letter in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if not depth and (
            letter == "," or (letter == ":" and text[place - 1] != ":" and text[place + 1 : place + 2] != ":")
        ):
            parts.append(text[begun:place])
            begun = place + 1
    return [part.strip() for part in [*parts, text[begun:]] if part.strip()]


def _operand(part: str) -> str:
    kind, _, value = part.partition("(")
    assert kind.strip().strip('"').lstrip("=+") in ("r", "n", "l", "f"), part
    return f"({value}"


INSTRUCTIONS: dict[str, Callable[[str], bool]] = {
    "lop3": lambda said: said.startswith("lop3.b32 %0, %1, %2, %3, %4;"),
    "sub": lambda said: said.startswith("sub.f16x2 %0, %1, %2;"),
    "fma": lambda said: said.startswith("fma.rn.f16x2 %0, %1, %2, %3;"),
    "shared": lambda said: "cvta.to.shared.u64 addr, %1; cvt.u32.u64 %0, addr;" in said,
    "ldmatrix": lambda said: said.startswith("ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
    "mma": lambda said: said.startswith("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
}

PRELUDE = """#include "emulator.h"

typedef unsigned int uint;
typedef unsigned char uchar;
typedef _Float16 half_t;
typedef _Float16 half;
struct char2 { signed char x, y; };
struct uint1 { uint x; };
struct int2 { int x, y; };
struct uint4 { uint x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct half2 { half x, y; };
typedef void* cudaStream_t;
#define cudaStreamDefault nullptr
#define make_uint4(...) uint4{__VA_ARGS__}
#define make_float4(...) float4{__VA_ARGS__}

alignas(1024) static unsigned char shared_memory[1 << 18];

inline uint __pack_half2(half_t low, half_t high) {
  half2 both{low, high};
  uint word;
  memcpy(&word, &both, 4);
  return word;
}

inline void ptx_lop3(uint& out, uint a, uint b, uint c, uint table) {
  out = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const uint place = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    out |= (table >> place & 1) << bit;
  }
}

inline void ptx_sub(uint& out, uint a, uint b) { out = Half::subtracted(a, b); }
inline void ptx_fma(uint& out, uint a, uint b, uint c) { out = Half::fused(a, b, c); }
inline void ptx_shared(uint& out, const void* at) { out = static_cast<const unsigned char*>(at) - shared_memory; }

// PTX ISA, ldmatrix: lane 8 i + j has where row j of the i-th matrix of 8 x 8 begins; of each a lane gets two numbers of row lane / 4.
inline void ptx_ldmatrix(uint& r0, uint& r1, uint& r2, uint& r3, uint at) {
  const int lane = threadIdx.x % 32;
  emulated::Warp& warp = emulated::warps[threadIdx.x / 32];
  warp.a[lane][0] = at;
  emulated::wait();
  uint out[4];
  for (int i = 0; i < 4; ++i) memcpy(&out[i], shared_memory + warp.a[8 * i + lane / 4][0] + 4 * (lane % 4), 4);
  emulated::wait();
  r0 = out[0], r1 = out[1], r2 = out[2], r3 = out[3];
}

inline void ptx_mma(float& d0, float& d1, float& d2, float& d3, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, float c0, float c1, float c2, float c3) {
  float sums[4] = {c0, c1, c2, c3};
  const uint a[4] = {a0, a1, a2, a3};
  Half::multiply(sums, a, b0, b1);
  d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
}

"""
