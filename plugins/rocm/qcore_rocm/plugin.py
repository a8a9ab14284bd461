"""What this plugin declares: its platform, the kernels' rows, and this host's devices. The core's portable kernels run on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.kernel import Kernel
from qcore.kernels.triton.rows import triton_fp8, triton_int8, triton_kernels, triton_kv_cache
from qcore.platform import Device, Platform
from qcore_rocm.devices import ARCHITECTURES, TARGETS, devices, report

QCORE_API = (1, 2)

_TRITON_ON = ("gfx90a", "gfx942", "gfx950", "gfx110?", "gfx115?", "gfx120?")
"""Architectures with matrix units of 16-bit floats, in their families as the compilers know them."""
_FP8_ON = ("gfx942", "gfx950", "gfx120?")
_TRITON = (("torch", "2.10"), ("triton|triton-rocm|pytorch-triton-rocm", "3.6"))


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("amd", "AMD GPU", ARCHITECTURES, portable=True, targets=TARGETS)]


@hookimpl
def qcore_kernels() -> Sequence[Kernel]:
    return [
        *triton_kernels("triton_rocm", ("amd",), ("bfloat16", "float16"), requires=_TRITON, architectures=_TRITON_ON),
        triton_kv_cache("triton_rocm", ("amd",), ("bfloat16", "float16"), requires=_TRITON, architectures=_TRITON_ON),
        triton_int8("triton_rocm", ("amd",), requires=_TRITON, architectures=_TRITON_ON),
        *triton_fp8("triton_rocm", ("amd",), requires=_TRITON, architectures=_FP8_ON),
    ]


@hookimpl
def qcore_evidence() -> Path:
    return Path(__file__).with_name("evidence.json")


@hookimpl
def qcore_devices() -> Sequence[Device]:
    return devices()


@hookimpl
def qcore_report() -> Mapping[str, str]:
    return report()
