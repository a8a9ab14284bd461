"""What this plugin declares: two platforms, the kernels' rows, and this host's CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcore.decoder import Decoder
from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel
from qcore.platform import Device, Platform
from qcore_cpu.devices import NATIVE, cpu_device
from qcore_cpu.library import ISA_VARIABLE, status

QCORE_API = (1, 1)

_PLATFORMS = ("x86_cpu", "arm_cpu")
_X86 = ("x86_cpu",)
_VECTORS = (frozenset({"avx512f"}), frozenset({"avx2", "fma"}))
_DTYPES = ("bfloat16", "float16", "float32")
_GROUPS = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 1024, 2048)
_TILES = ("block32", "block64", "block128", "tile1x128", "tile64x32")
_FLOATS = ("fp8", "e4m3", "e4m3fnuz", "e5m2", "e3m2", "e2m3")
_BLOCKS = (32, 64, 128, 256, 512, 1024)
_CODEBOOK_SCALES = tuple(text for n in _BLOCKS for text in (f"g{n}", f"flat{n}", f"flat{n}:dynamic8+flat{256 * n}"))
_WHOLE_BLOCKS = ("q?_?", "tq?_?", "iq*")
"""Block types whose codes stand for whole numbers."""
_INT4_GROUPS = ("g32", "g64", "g128", "g256")


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("x86_cpu", "x86 CPU", portable=True), Platform("arm_cpu", "Arm CPU", portable=True)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    return [
        *_native_kernels(),
        Kernel("torch_int4pack", "torch", "linear", _X86,
               Accepts(("int4", "uint4"), _INT4_GROUPS, (None, "stored"), ordered=True),
               ("bfloat16",), cost=0.4, implementation="qcore_cpu.kernels.int4:Int4Linear",
               note="torch's weight-only int4 operator; scales and zero points are rounded to bfloat16",
               features=_VECTORS, requires=(("torch", "2.8"),), multiples=(16, 32)),
        Kernel("torch_int4pack_gguf", "torch", "linear", _X86,
               Accepts(("gguf:q4_0", "gguf:q4_1", "gguf:q4_k")),
               ("bfloat16",), cost=0.4, implementation="qcore_cpu.kernels.int4:Int4Linear",
               note="blocks repacked for torch's weight-only int4 operator; scales are rounded to bfloat16",
               features=_VECTORS, requires=(("torch", "2.8"),), multiples=(16, 32)),
        Kernel("torch_int8pack", "torch", "linear", _X86,
               Accepts(("int8",), ("channel", "tensor")),
               ("bfloat16",), cost=0.6, implementation="qcore_cpu.kernels.int8:Int8Linear",
               note="torch's weight-only int8 operator; scales are rounded to bfloat16",
               features=_VECTORS, requires=(("torch", "2.8"),),
               multiples=(1, 32)),  # torch 2.13 reads past rows that are not whole vectors
        Kernel("onednn_int8", "onednn", "linear", _X86,
               Accepts(("int8",), ("channel", "tensor"), inputs=("int8-token-sym-dyn", "int8-tensor-sym")),
               ("bfloat16", "float16"), cost=0.6, implementation="qcore_cpu.kernels.int8:OnednnInt8Linear",
               # In float32 the last bit decides which way codes of the next layer fall: there the definition's order of
               # sums is kept, with which a model's perplexity is its tool's own.
               note="oneDNN's int8 x int8 product, exact in int32, scales in float32",
               features=_VECTORS, requires=(("torch", "2.8"),)),
    ]  # fmt: skip


def _native_kernels() -> Sequence[Kernel]:
    """This package's own, in C++."""

    def native(name: str, accepts: Accepts, dtypes: tuple[str, ...], cost: float, note: str,
               implementation: str = "NativeLinear", **facts: Any) -> Kernel:  # fmt: skip
        return Kernel(name, "native", "linear", _X86, accepts, dtypes, cost, f"qcore_cpu.kernels.native:{implementation}",
                      note, features=(frozenset({NATIVE}),), sources=("native/*",), **{"ragged": True, **facts})  # fmt: skip

    integers, zeros = ("int?", "uint?"), (None, "stored", "float")
    scales = ("tensor", "channel", *(f"g{n}" for n in _GROUPS))
    return [
        native("native_linear", Accepts(integers, scales, zeros, ordered=True), _DTYPES, 0.3,
               "weight-only integers; products and sums in float32"),
        native("native_float", Accepts(_FLOATS, (*scales, *_TILES)), _DTYPES, 0.35,
               "weight-only small floats; products and sums in float32"),
        native("native_microscaling", Accepts(("e2m1", *_FLOATS), ("g32:e8m0", "g16:e4m3fn", "g16:e4m3fn+tensor")), _DTYPES, 0.35,
               "weight-only MX and NVFP4; products and sums in float32"),
        native("native_codebook", Accepts(("nf4", "fp4", "e2m1"), _CODEBOOK_SCALES), _DTYPES, 0.35,
               "weight-only 4-bit codebooks, nested scales as they are; products and sums in float32", ragged=False),
        native("native_gguf", Accepts(("gguf:*",)), _DTYPES, 0.3,
               "ggml's blocks with their codes and scales as they are; products and sums in float32"),
        native("native_gguf_int8", Accepts(tuple(f"gguf:{name}" for name in _WHOLE_BLOCKS)), _DTYPES, 0.25,
               "the same, activations rounded to int8 with one scale for 16 or 32 of them", "NativeLinearInt8",
               quantizes_input=True),
        Kernel("native_embedding", "native", "embedding", _X86, Accepts((*integers, "gguf:*"), ("none", *scales), zeros, ordered=True), _DTYPES,
               0.5, "qcore_cpu.kernels.native:NativeEmbedding", "decodes the rows that are looked up",
               features=(frozenset({NATIVE}),), sources=("native/*",), ragged=True),
        native("native_int8", Accepts(("int8", "uint8", "int4", "uint4"), ("tensor", "channel", "g32", "g64", "g128"), zeros,
                                      ordered=True, inputs=("int8-token-sym-dyn", "int8-tensor-sym")),
               ("bfloat16", "float16"), 0.5, "int8 activations; products of whole numbers, exact"),
        native("native_float8", Accepts(_FLOATS, (*scales, *_TILES), inputs=("fp8-token-dyn", "fp8-tensor", "fp8-tensor-dyn", "fp8-g128-dyn")),
               ("bfloat16", "float16"), 0.5, "small floats by activations in e4m3; products exact, sums in float32"),
        native("native_linear_int8", Accepts(integers, scales, zeros, ordered=True), _DTYPES, 0.25,
               "weight-only integers, activations rounded to int8 with one scale for 16 or 32 of them",
               "NativeLinearInt8", quantizes_input=True),
    ]  # fmt: skip


@hookimpl
def qcore_decoders() -> Sequence[Decoder]:
    if not status().isa:
        return []
    return [
        Decoder("native_decoder", "cpu", "qcore_cpu.decoder:NativeDecoder",
                note="llama's and its kin's layers in one call a token, or a few hundred, on the native kernels"),
    ]  # fmt: skip


@hookimpl
def qcore_evidence() -> Path:
    return Path(__file__).with_name("evidence.json")


@hookimpl
def qcore_devices() -> Sequence[Device]:
    device = cpu_device()
    return [device] if device.platform in _PLATFORMS else []


@hookimpl
def qcore_report() -> Mapping[str, str]:
    device = cpu_device()
    return {
        "cpu": device.name,
        "instruction sets": " ".join(sorted(device.features)) or "none that kernels use",
        "native kernels": _native_state(),
    }


def _native_state() -> str:
    found = status()
    if not found.isa:
        return f"none ({found.fault}): torch's operators and the reference run everything, more slowly"
    others = ", ".join(found.available)
    return f"{found.isa} (of {others}; {ISA_VARIABLE} chooses)"
