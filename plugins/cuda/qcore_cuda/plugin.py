"""What this plugin declares: its platforms, the kernels' rows, and this host's devices. The core's portable kernels run on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel
from qcore.kernels.triton.rows import triton_fp8, triton_int8, triton_kernels, triton_kv_cache
from qcore.platform import Device, Platform
from qcore_cuda.columns import PLATFORMS
from qcore_cuda.devices import examine

QCORE_API = (1, 5)

_AMPERE_UP = ("ampere", "ada", "hopper", "blackwell")
_BF16 = (frozenset({"bf16"}),)
_TORCH = (("torch", "2.8"),)
_TRITON = (*_TORCH, ("triton", "3.6"))
_MARLIN = ("codes", "dense", "vector", "warpgroup", "wgmma", "wide")
_INT8 = ("int8_few", "int8_round", "int8_sums", "int8_tiles")


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return PLATFORMS


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    return [
        Kernel("cuda_int4pack", "torch", "linear", ("hopper",),
               Accepts(("int4", "uint4"), ("g32", "g64", "g128", "g256"), (None, "stored"), ordered=True),
               ("bfloat16",), cost=0.6, implementation="qcore_cuda.kernels.int4:Int4Linear",
               note="torch's weight-only int4 operator, beyond 64 rows slower: a dense product; scales and zero points in bfloat16",
               features=_BF16, requires=_TORCH, multiples=(8, 32)),
        Kernel("cuda_int4pack_gguf", "torch", "linear", ("hopper",),
               Accepts(("gguf:q4_0", "gguf:q4_1", "gguf:q4_k")),
               ("bfloat16",), cost=0.6, implementation="qcore_cuda.kernels.int4:Int4Linear",
               note="blocks repacked for torch's weight-only int4 operator, beyond 64 rows slower: a dense product; scales in bfloat16",
               features=_BF16, requires=_TORCH, multiples=(8, 32)),
        Kernel("cublas_int8", "cublas", "linear", ("turing", *_AMPERE_UP),
               Accepts(("int8",), ("channel", "tensor"), inputs=("int8-token-sym-dyn", "int8-tensor-sym")),
               ("bfloat16", "float16"), cost=0.6, implementation="qcore_cuda.kernels.scaled:Int8Linear",
               note="cuBLASLt's int8 x int8 product, exact in int32; inputs are rounded by unfused operators, slower than a dense layer",
               features=(frozenset({"int8_tensor_core"}),), requires=_TORCH, multiples=(8, 8)),
        Kernel("cublas_fp8", "cublas", "linear", ("ada", "hopper", "blackwell"),
               Accepts(("fp8",), ("channel", "tensor"), inputs=("fp8-token-dyn*", "fp8-tensor")),
               ("bfloat16",), cost=0.3, implementation="qcore_cuda.kernels.scaled:Fp8Linear",
               note="cuBLASLt's fp8 x fp8 product, up to 64 rows Triton's; inputs are rounded by one kernel before",
               features=(frozenset({"fp8"}),), requires=_TRITON, multiples=(16, 16), experts=True),
        Kernel("cublas_fp8_tensor", "cublas", "linear", ("ada", "hopper", "blackwell"),
               Accepts(("fp8",), ("channel", "tensor"), inputs=("fp8-tensor-dyn*",)),
               ("bfloat16",), cost=0.3, implementation="qcore_cuda.kernels.fp8_tensor:Fp8TensorLinear",
               note="cuBLASLt's fp8 x fp8 product, up to 64 rows Triton's; torch's operators find the scale of all inputs, one kernel rounds them",
               features=(frozenset({"fp8"}),), requires=_TRITON, multiples=(16, 16), experts=True),
        Kernel("cublas_fp8_block128", "cublas", "linear", ("hopper",),
               Accepts(("fp8",), ("block128", "tile1x128"), inputs=("fp8-g128-dyn",)),
               ("bfloat16",), cost=0.3, implementation="qcore_cuda.kernels.fp8_blocks:BlocksLinear",
               note="cuBLASLt's fp8 x fp8 product by blocks, where torch is built for CUDA 12.9 or newer; up to 64 rows, and for experts, Triton's; "
                    "inputs are rounded by one kernel before",
               features=(frozenset({"fp8", "cuda12.9"}),), requires=(("torch", "2.9"), ("triton", "3.6")), multiples=(128, 128), experts=True),
        *_int8(),
        Kernel("bitblas_int", "bitblas", "linear", ("volta", "turing", "ampere", "ada"),
               Accepts(("int2", "int4", "uint2", "uint4"), ("g32", "g64", "g128", "g256", "g512", "g1024", "channel", "tensor"), (None, "stored")),
               ("float16",), cost=0.29, implementation="qcore_cuda.kernels.bitblas:BitblasLinear",
               note="the package bitblas's own product, where it is installed: timed beside the kernel that comes next when the first layer of a shape is made, "
                    "and taken where it is the quicker",
               features=(frozenset({"fp16_tensor_core"}),), requires=(*_TORCH, ("bitblas", "0.1")), multiples=(128, 128), optional=True),
        *_marlin("marlin", "Marlin", _AMPERE_UP, ("bfloat16", "float16"), _BF16),
        *_marlin("marlin_fp16", "SmallMarlin", ("turing",), ("float16",), ()),
        *triton_kernels("triton", _AMPERE_UP, ("bfloat16", "float16"), features=_BF16, requires=_TRITON),
        triton_int8("triton", _AMPERE_UP, features=(frozenset({"int8_tensor_core"}),), requires=_TRITON),
        *triton_fp8("triton", ("ada", "hopper", "blackwell"), features=(frozenset({"fp8"}),), requires=_TRITON),
        triton_kv_cache("triton", _AMPERE_UP, ("bfloat16", "float16"), features=_BF16, requires=_TRITON),
        triton_kv_cache("triton_fp16", ("volta", "turing"), ("float16",), attends=False, requires=_TRITON),
        *triton_kernels("triton_fp16", ("volta", "turing"), ("float16",), requires=_TRITON),
    ]  # fmt: skip


def _native(*names: str) -> tuple[str, ...]:
    """Files of native/ that a kernel in CUDA C++ is made of: its own, and what they have of a GPU and of a CPU."""
    return tuple(f"native/{name}" for name in (*(f"{name}.cuh" for name in (*names, "device")), "emulator.h"))


def _int8() -> Sequence[Kernel]:
    few = "dot products of four bytes"
    units = (
        ("dp4a", "volta", "dp4a", "Dots", f"by {few}; hundreds of rows at half of the peak of float16 tensor cores"),
        ("mma", "turing", "int8_tensor_core", "Tensors", f"on tensor cores, and up to 16 rows by {few}"),
    )
    inputs = (
        ("int8", ("int8-token-sym-dyn", "int8-tensor-sym"), "int8:{}Linear", "inputs are rounded by one kernel before", _INT8),
        ("llm_int8", ("int8-token-sym-dyn-outliers*",), "int8_outliers:{}OutliersLinear",
         "columns with outliers are added in float32, which takes the longer the more there are", (*_INT8, "int8_outliers")),
    )  # fmt: skip
    return [
        Kernel(f"{unit}_{name}", "cuda", "linear", (platform,), Accepts(("int8",), ("channel", "tensor"), inputs=taken), ("float16",), 0.35,
               f"qcore_cuda.kernels.{implementation.format(prefix)}", f"int8 x int8 in CUDA C++, exact in int32, {by}; {more}",
               features=(frozenset({feature}),), requires=_TORCH, sources=_native(*files), compiles=True)
        for unit, platform, feature, prefix, by in units
        for name, taken, implementation, more, files in inputs
    ]  # fmt: skip


def _marlin(
    prefix: str, kind: str, platforms: tuple[str, ...], dtypes: tuple[str, ...], features: tuple[frozenset[str], ...]
) -> Sequence[Kernel]:  # fmt: skip
    sizes = (16, 32, *range(64, 1025, 64))
    scales = (*(f"g{size}" for size in sizes), "channel", "tensor")
    flat = tuple(f"flat{size}" for size in sizes)
    nested = tuple(f"flat{size}:dynamic8+flat{256 * size}" for size in sizes)
    return [
        Kernel(f"{prefix}_{name}", "marlin", "linear", platforms, accepts, dtypes, 0.3, f"qcore_cuda.kernels.{module}:{kind}{layer}",
               f"{what} in CUDA C++, permuted as tensor cores take it and decoded by {by}; more than 256 rows by a dense product; "
               "experts in one launch where Triton is installed, else one by one",
               features=features, requires=_TORCH, multiples=(16, 64), sources=_native(*_MARLIN), compiles=True, experts=True)
        for name, module, layer, what, by, accepts in (
            ("int4", "marlin", "Linear", "int4", "masks", Accepts(("int4", "uint4"), scales, (None, "stored"), ordered=True)),
            ("eights", "marlin", "Linear", "int8 or e4m3", "masks", Accepts(("int8", "fp8"), (*scales, "block128"), ordered=True)),
            ("tables", "marlin", "Linear", "4-bit codebooks and floats", "a table in registers",
             Accepts(("nf4", "fp4", "e2m1"), (*scales, *flat, *nested, "g32:e8m0", "g16:e4m3fn", "g16:e4m3fn+tensor"))),
            ("blocks", "marlin_blocks", "BlockLinear", "ggml's blocks of 4 and 8 bits without minima", "masks or a table in registers",
             Accepts(("gguf:q4_0", "gguf:q8_0", "gguf:iq4_*", "gguf:*fp4"))),
        )
    ]  # fmt: skip


@hookimpl
def qcore_evidence() -> Path:
    return Path(__file__).with_name("evidence.json")


@hookimpl
def qcore_devices() -> Sequence[Device]:
    return examine().devices


@hookimpl
def qcore_report() -> Mapping[str, str]:
    return examine().report
