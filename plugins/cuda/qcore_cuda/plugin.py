"""What this plugin declares: its platforms and this host's devices. The core's portable kernels run on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcore.hookspecs import hookimpl
from qcore.platform import Device, Platform
from qcore_cuda.columns import PLATFORMS
from qcore_cuda.devices import examine

QCORE_API = (1, 0)


@hookimpl
def qcore_platforms() -> Sequence[Platform]:
    return PLATFORMS


@hookimpl
def qcore_evidence() -> Path:
    return Path(__file__).with_name("evidence.json")


@hookimpl
def qcore_devices() -> Sequence[Device]:
    return examine().devices


@hookimpl
def qcore_report() -> Mapping[str, str]:
    return examine().report
