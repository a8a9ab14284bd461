"""Choosing the device to run on."""

from __future__ import annotations

import os

from qcore.checkpoint.open import Checkpoint
from qcore.discovery import registry
from qcore.platform import Device, Platform
from qcore.refusal import Refusal, Refused


def find_device(name: str = "auto") -> Device:
    """The device of this host with the id `name`; `auto` is the one that the environment variable QCORE_DEVICE names, or
    else the first real one that a plugin found, accelerators before CPUs.

    Raises Refused (no-device).
    """
    if name == "auto":
        name = os.environ.get("QCORE_DEVICE") or name
    devices = sorted(registry().devices(), key=lambda device: device.torch_device == "cpu")
    for device in devices:
        if device.id == name or (name == "auto" and not device.simulated):
            return device
    found = ", ".join(device.id for device in devices)
    fix = f"Use one of: {found}." if found else "Install a plugin for this host, such as: pip install 'qcore[cpu]'."
    raise Refused(Refusal("no-device", "missing-dep", f"device {name}", "no such device was found on this host",
                          f"found {found or 'none'}", fix))  # fmt: skip


def wanted_dtype(name: str, device: Device | None, checkpoint: Checkpoint) -> str | None:
    """What `load_model` is to be asked for: None for the checkpoint's own, which may differ from layer to layer."""
    return None if name == "checkpoint" else compute_dtype(name, device, checkpoint)


def compute_dtype(name: str, device: Device | Platform | None, checkpoint: Checkpoint) -> str:
    """What to compute in: auto is the device's fastest, or the platform's (bfloat16 where neither is known), checkpoint the
    checkpoint's own, and any other name itself."""
    if name == "auto":
        return device.fast_dtype if device else "bfloat16"
    return checkpoint.own_dtype if name == "checkpoint" else name
