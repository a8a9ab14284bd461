"""What this plugin declares: its platform, the kernels' rows, and this host's devices. The core's portable kernels run on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts, Kernel
from qcore.kernels.triton.rows import triton_kernels, triton_kv_cache
from qcore.platform import Device, Platform
from qcore_xpu.devices import ARCHITECTURES, examine, stand_ins

QCORE_API = (1, 2)

_TORCH = (("torch", "2.8"),)
_TRITON = (*_TORCH, ("triton|triton-xpu|pytorch-triton-xpu", "3.6"))
_16_BITS = ("bfloat16", "float16")
_GROUPS = ("g32", "g64", "g96", "g128", "g160", "g192", "g256", "g512", "g1024")
_OPTIONAL = (
    "optional: only where the XPU build of Intel Extension for PyTorch (IPEX) is installed; it is archived upstream"
)


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("xpu", "Intel GPU", ARCHITECTURES, portable=True)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    def onednn(
        name: str,
        accepts: Accepts,
        feature: str,
        cost: float,
        implementation: str,
        note: str,
        multiples: tuple[int, int],
    ) -> Kernel:
        return Kernel(f"xpu_{name}", "onednn", "linear", ("xpu",), accepts, _16_BITS, cost, f"qcore_xpu.kernels.{implementation}", note,
                      features=(frozenset({feature}),), requires=_TORCH, multiples=multiples)  # fmt: skip

    def extension(
        name: str, accepts: Accepts, implementation: str, note: str, multiples: tuple[int, int] = (1, 1)
    ) -> Kernel:
        return Kernel(f"xpu_{name}", "ipex", "linear", ("xpu",), accepts, _16_BITS, 0.6, f"qcore_xpu.kernels.ipex:{implementation}", f"{note}; {_OPTIONAL}",
                      features=(frozenset({name}),), requires=_TORCH, multiples=multiples)  # fmt: skip

    rows = ("channel", "tensor")
    return [
        onednn("int4pack", Accepts(("int4", "uint4"), _GROUPS, (None, "stored"), ordered=True),
               "int4pack", 0.4, "int4:Int4Linear", "torch's weight-only int4 operator; scales in the activations' type", (8, 32)),
        onednn("int8pack", Accepts(("int8",), rows), "int8pack", 0.45, "eights:Int8Linear",
               "torch's weight-only int8 operator; scales in the activations' type", (1, 16)),
        onednn("int8", Accepts(("int8",), rows, inputs=("int8-token-sym-dyn", "int8-tensor-sym")), "int_mm", 0.4, "eights:Int8ProductLinear",
               "oneDNN's int8 x int8 product, exact in int32; inputs are rounded by unfused operators", (8, 16)),
        onednn("fp8", Accepts(("fp8",), rows, inputs=("fp8-token-dyn", "fp8-tensor")), "scaled_mm", 0.4, "eights:Fp8ProductLinear",
               "oneDNN's fp8 x fp8 product; inputs are rounded by unfused operators", (16, 16)),
        extension("ipex_int4", Accepts(("int4", "uint4"), _GROUPS, (None, "stored"), ordered=True),
                  "IpexInt4Linear", "IPEX's weight-only int4 operator; scales in the activations' type", (8, 32)),
        extension("ipex_fp8_w8a16", Accepts(("fp8",), rows), "IpexFp8Linear", "IPEX's weight-only fp8 operator"),
        extension("ipex_fp8", Accepts(("fp8",), rows, inputs=("fp8-token-dyn", "fp8-tensor")),
                  "IpexFp8ProductLinear", "IPEX's fp8 x fp8 product; inputs are rounded by unfused operators"),
        triton_kv_cache("triton_xpu", ("xpu",), _16_BITS, requires=_TRITON),
        *triton_kernels("triton_xpu", ("xpu",), _16_BITS, requires=_TRITON),
    ]  # fmt: skip


@hookimpl
def qcore_stand_ins() -> Sequence[Device]:
    return stand_ins()


@hookimpl
def qcore_evidence() -> Path:
    return Path(__file__).with_name("evidence.json")


@hookimpl
def qcore_devices() -> Sequence[Device]:
    return examine().devices


@hookimpl
def qcore_report() -> Mapping[str, str]:
    return examine().report
