"""This host's Intel GPUs: a render node of Intel's and a torch that is built for them come first, then torch.xpu is asked,
for which GPUs it runs on is known to its runtime alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qcore.host import Host
from qcore.platform import Device
from qcore_xpu import ipex
from qcore_xpu.operators import available

ARCHITECTURES = ("tgl", "dg1", "dg2", "pvc", "mtl", "arl", "lnl", "bmg", "ptl")
"""Xe generations in the compiler's words, from the oldest to the newest."""

_BY_DEVICE: tuple[tuple[str, str], ...] = (
    ("9a4", "tgl"), ("490", "dg1"), ("4f8", "dg2"), ("56", "dg2"), ("0bd", "pvc"), ("0b6", "pvc"),
    ("7d41", "arl"), ("7d51", "arl"), ("7d67", "arl"), ("7dd1", "arl"), ("7d", "mtl"),
    ("64", "lnl"), ("e2", "bmg"), ("b08", "ptl"), ("b09", "ptl"), ("b0a", "ptl"), ("b0b", "ptl"),
)  # fmt: skip
"""PCI device ids by their first digits, the longer ones first (Linux, include/drm/intel/pciids.h)."""

_MATRIX_ENGINE = frozenset({"dg2", "pvc", "arl", "lnl", "bmg", "ptl"})
"""Those with XMX units."""


@dataclass(frozen=True)
class Finding:
    """The usable devices, and what `qcore doctor` prints."""

    devices: tuple[Device, ...] = ()
    report: dict[str, str] = field(default_factory=dict)


def examine(host: Host | None = None) -> Finding:
    """Looks at the host; never raises."""
    looked_at = host or Host()
    found = nodes(looked_at)
    if not found:
        return Finding(report={"GPUs": "none: no render node in /dev/dri is Intel's"})
    build = looked_at.torch_build()
    names = (f"{node} ({device}, {architecture(device) or 'before Xe, or newer'})" for node, device in found.items())
    report = {
        "GPUs": ", ".join(names),
        "torch": build.get("version", "not installed"),
        ipex.DISTRIBUTION: ipex.report(looked_at),
    }
    if "xpu" not in build:
        report["missing"] = f"torch {build.get('version', 'is absent')} is not built for Intel GPUs"
        report["fix"] = "Install torch's XPU build; intel-extension-for-pytorch is archived and not needed."
        return Finding(report=report)
    try:
        devices = _asked(looked_at, found)
    except Exception as error:  # whatever the driver and torch make of each other
        report |= {"missing": f"torch.xpu failed: {error}"[:300], "fix": "Update Intel's compute runtime (level-zero)."}
        return Finding(report=report)
    if not devices:
        report |= {"missing": "torch.xpu finds none of them", "fix": "Install Intel's compute runtime (level-zero)."}
    return Finding(devices, report)


def stand_ins() -> tuple[Device, ...]:
    """The CPU in the place of an Intel GPU. Raises RuntimeError where there is one."""
    from qcore_xpu import ipex_stand_in, stand_in

    return (Device("xpu-stand-in", "xpu", "stand-in for torch's and its extension's operators on Intel GPUs, and Triton's interpreter", "cpu",
                   features=stand_in.load() | ipex_stand_in.load() | {"xmx"}, simulated=True),)  # fmt: skip


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


def architecture(device: str) -> str:
    """The generation of a PCI device id; empty where it is older than Xe, or newer than the table."""
    return next((name for start, name in _BY_DEVICE if device.startswith(start)), "")


def _asked(host: Host, found: dict[str, str]) -> tuple[Device, ...]:
    """torch.xpu's devices; found: the host's render nodes, and their PCI device ids. Raises whatever torch raises."""
    import torch

    xpu: Any = torch.xpu
    if not xpu.is_available():
        return ()
    alike = set(found.values())
    only = alike.pop() if len(alike) == 1 else ""
    return tuple(_device(host, place, xpu.get_device_properties(place), only) for place in range(xpu.device_count()))


def _device(host: Host, place: int, facts: Any, only: str) -> Device:
    """only: the PCI device id of all of the host's Intel GPUs, if they are alike; torch 2.8 tells none."""
    told = getattr(facts, "device_id", None)
    kind = architecture(only if told is None else f"{told:04x}")
    return Device(
        id=f"xpu:{place}",
        platform="xpu",
        name=facts.name,
        torch_device=f"xpu:{place}",
        architecture=kind,
        features=available() | ipex.available(host, facts) | ({"xmx"} if kind in _MATRIX_ENGINE else set()),
        memory=facts.total_memory,
        fast_dtype="bfloat16",
        facts={"driver": str(getattr(facts, "driver_version", ""))},
    )
