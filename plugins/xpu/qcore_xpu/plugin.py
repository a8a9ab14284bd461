"""What this plugin declares: its platform and this host's devices. The core's portable kernels run on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.platform import Device, Platform
from qcore_xpu.devices import ARCHITECTURES, examine

QCORE_API = (1, 0)


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return [Platform("xpu", "Intel GPU", ARCHITECTURES, portable=True)]


@hookimpl
def qcore_evidence() -> Path:
    return Path(__file__).with_name("evidence.json")


@hookimpl
def qcore_devices() -> Sequence[Device]:
    return examine().devices


@hookimpl
def qcore_report() -> Mapping[str, str]:
    return examine().report
