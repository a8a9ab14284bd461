"""What this plugin declares: two platforms, the kernels' rows, and this host's CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel
from qcore.platform import Device, Platform
from qcore_cpu.devices import cpu_device

QCORE_API = (1, 0)

_PLATFORMS = ("x86_cpu", "arm_cpu")
_X86 = ("x86_cpu",)
_VECTORS = (frozenset({"avx512f"}), frozenset({"avx2", "fma"}))
_INT4_GROUPS = ("g32", "g64", "g128", "g256")


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("x86_cpu", "x86 CPU", portable=True), Platform("arm_cpu", "Arm CPU", portable=True)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    return [
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
        "native kernels": "none in this version: torch's operators and the reference run everything",
    }
