"""The operators of torch's own that kernels here call on Intel GPUs, and which of them an installed torch has there.

Source: torch's native_functions.yaml, which its wheels carry (torchgen/packaged/ATen/native), and aten/src/ATen/native/mkldnn/xpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OPERATORS: Mapping[str, str] = MappingProxyType(
    {
        "int4pack": "_weight_int4pack_mm_with_scales_and_zeros",
        "int8pack": "_weight_int8pack_mm",
        "int_mm": "_int_mm",
        "scaled_mm": "_scaled_mm",
    }
)
"""A device's feature, and the operator that it stands for."""


def available() -> frozenset[str]:
    """The features of the installed torch, from its dispatcher."""
    import torch

    def has(name: str) -> bool:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "XPU"))

    return frozenset(feature for feature, name in OPERATORS.items() if has(name))
