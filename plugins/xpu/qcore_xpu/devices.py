"""This host's Intel GPUs: a render node of Intel's and a torch that is built for them come first, then torch.xpu is asked.

Which of Intel's GPUs torch runs on is known to its runtime alone, so that there is no table of names to go stale; the
architecture is what the runtime calls it. Source: torch.xpu.get_device_properties.
"""

from __future__ import annotations

from typing import Any

from qcore.host import Host
from qcore.platform import Device

ARCHITECTURES = ("tgl", "dg1", "acm", "pvc", "mtl", "arl", "lnl", "bmg", "ptl")
"""Xe generations in oneAPI's words, from the oldest to the newest."""

_BY_DEVICE: tuple[tuple[str, str], ...] = (
    ("0bd", "pvc"), ("0b6", "pvc"), ("56", "acm"), ("e20", "bmg"), ("e21", "bmg"), ("64", "lnl"), ("7d5", "mtl"),
    ("7d4", "mtl"), ("7d6", "arl"), ("7dd", "arl"), ("b08", "ptl"), ("b09", "ptl"), ("490", "dg1"), ("9a4", "tgl"),
)  # fmt: skip
"""PCI device ids by their first digits (Linux, include/drm/intel/pciids.h)."""

_MATRIX_ENGINE = frozenset({"acm", "pvc", "arl", "lnl", "bmg", "ptl"})
"""Those with XMX units."""


def devices(host: Host | None = None) -> list[Device]:
    """The GPUs that torch.xpu runs on, in its order."""
    looked_at = host or Host()
    if not nodes(looked_at) or unusable(looked_at):
        return []
    import torch

    xpu: Any = torch.xpu
    if not xpu.is_available():
        return []
    return [_device(place, xpu) for place in range(xpu.device_count())]


def report(host: Host | None = None) -> dict[str, str]:
    """What `qcore doctor` prints."""
    looked_at = host or Host()
    found = nodes(looked_at)
    if not found:
        return {"GPUs": "none: no render node in /dev/dri is Intel's"}
    said = {
        "GPUs": ", ".join(
            f"{node} ({device}, {architecture(device) or 'before Xe'})" for node, device in found.items()
        ),
        "torch": looked_at.torch_build().get("version", "not installed"),
    }
    if problem := unusable(looked_at):
        said["missing"], said["fix"] = problem
    return said


def nodes(host: Host) -> dict[str, str]:
    """Intel's render nodes, and the PCI device id of each."""
    found = {}
    for path in host.paths("/sys/class/drm/renderD*"):
        vendor, device = (
            host.text(f"{path}/device/{name}").removeprefix("0x").lower() for name in ("vendor", "device")
        )
        if vendor == "8086":
            found[path.rpartition("/")[2]] = device
    return found


def unusable(host: Host) -> tuple[str, str] | None:
    """Why this environment's torch cannot use the GPUs, and the fix; None where it may."""
    build = host.torch_build()
    if "xpu" not in build:
        fix = "Install torch's XPU build; intel-extension-for-pytorch is not needed and no longer maintained."
        return f"torch {build.get('version', 'is absent')} is not built for Intel GPUs", fix
    return None


def architecture(device: str) -> str:
    """The generation of a PCI device id; empty where it is older than Xe, or newer than the table."""
    return next((name for start, name in _BY_DEVICE if device.startswith(start)), "")


def _device(place: int, xpu: Any) -> Device:
    facts = xpu.get_device_properties(place)
    kind = architecture(f"{getattr(facts, 'device_id', 0):04x}")
    return Device(
        id=f"xpu:{place}",
        platform="xpu",
        name=facts.name,
        torch_device=f"xpu:{place}",
        architecture=kind,
        features=frozenset({"xmx"} if kind in _MATRIX_ENGINE else ()) | {"bf16"},
        memory=facts.total_memory,
        fast_dtype="bfloat16",
        facts={"driver": str(getattr(facts, "driver_version", ""))},
    )
