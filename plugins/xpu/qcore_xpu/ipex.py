"""Intel Extension for PyTorch: an optional, older route to Intel GPUs, archived upstream. Which of its operators kernels here call, whether the installed
one can be used, and importing it.

Source: the extension's repository at v2.8.10+xpu: csrc/gpu/aten/operators (XEGEMM_INT4.cpp, fp8/FP8Linear.cpp) registers the operators,
intel_extension_for_pytorch/__init__.py and setup.py say what it works with and how its builds are named.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from qcore.host import Host
from qcore.refusal import Refusal, Refused

DISTRIBUTION = "intel-extension-for-pytorch"

OPERATORS: Mapping[str, str] = MappingProxyType(
    {
        "ipex_int4": "mm_int4.xpu",
        "ipex_fp8_w8a16": "fp8_gemm_w8a16.xpu",
        "ipex_fp8": "fp8_gemm.Tensor",
    }
)
"""A device's feature, and the operator of torch.ops.torch_ipex that it stands for, with its overload: builds for CPUs have none of them."""

_ONEDNN = ("has_subgroup_matrix_multiply_accumulate", "has_subgroup_2d_block_io")
"""What torch.xpu says of devices where the extension runs oneDNN: XMX units, and loads of blocks. On others mm_int4 runs XeTLA, which wants another layout."""


def fault(host: Host) -> str:
    """Why the extension cannot be used on this host; empty where it can. Imports nothing: beside a torch of another minor version the import would end the
    process."""
    version, torch = host.package(DISTRIBUTION), host.torch_build().get("version", "")
    build = version.partition("+")[2]
    if not version:
        return "not installed"
    if build in ("", "cpu"):
        return f"{version} is the build for CPUs"
    if _minor(version) < (2, 8):
        return f"{version} is older than 2.8"
    if _minor(version) != _minor(torch):
        return f"{version} does not work with torch {torch or 'absent'}"
    if host.environment.get("IPEX_COMPUTE_ENG") in ("4", "XETLA"):
        return "IPEX_COMPUTE_ENG asks for XeTLA, and kernels here are for oneDNN"
    return ""


def available(host: Host, properties: object) -> frozenset[str]:
    """The features that the extension gives a device of these properties, as torch.xpu tells them. Whether its operators are there in fact is seen when a
    kernel is first made."""
    suits = all(getattr(properties, name, False) for name in _ONEDNN)
    return frozenset(OPERATORS) if suits and not fault(host) else frozenset()


def report(host: Host) -> str:
    """What `qcore doctor` says of it."""
    reason = fault(host)
    return f"{reason or host.package(DISTRIBUTION)} (optional, for torch 2.8; archived upstream)"


def require(feature: str) -> None:
    """Imports the extension, unless its operator is there. Raises Refused (missing-requirement) where it is not there then."""
    import torch

    name = f"torch_ipex::{OPERATORS[feature]}"
    if torch._C._dispatch_has_kernel(name):
        return
    reason = _imported()
    if not torch._C._dispatch_has_kernel(name):
        raise Refused(Refusal("missing-requirement", "missing-dep", DISTRIBUTION, "its operators for Intel GPUs are not there",
                              f"found no {name}: {reason or 'this build lacks it'}",
                              "Another kernel takes this layer; the package is optional, and archived upstream."))  # fmt: skip


@cache
def _imported() -> str:
    """Why it could not be imported, or an empty string."""
    if reason := fault(Host()):
        return reason
    try:
        importlib.import_module("intel_extension_for_pytorch")
    except (Exception, SystemExit) as error:  # whatever its libraries and the driver make of each other
        return f"importing it failed: {error}"[:300]
    return ""


def _minor(version: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
