"""What this host shows of its hardware before any vendor's library is asked: files of /proc, /sys and /dev, variables,
and what is installed. Detection starts here, so that it is quick on a host that has none of the hardware."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class PciDevice:
    """One function on the PCI bus; the numbers are as in /sys, lower-case hexadecimal without `0x`."""

    address: str
    vendor: str
    device: str
    kind: str
    """The PCI class, such as `120000` for a processing accelerator."""


@dataclass(frozen=True)
class Host:
    """A machine to look at.

    root: the folder that holds its /proc, /sys and /dev; tests give one with files recorded elsewhere. environment: its
    variables. packages, modules, torch: what answers `package`, `has_module` and `torch_build`; None asks this interpreter.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    packages: Mapping[str, str] | None = None
    modules: frozenset[str] | None = None
    torch: Mapping[str, str] | None = None

    def text(self, path: str) -> str:
        """The stripped text of a file such as `/proc/cpuinfo`, or an empty string."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return ""

    def paths(self, pattern: str) -> list[str]:
        """The paths that match, such as `/dev/accel*`, sorted by name and then by number."""
        try:
            found = [f"/{path.relative_to(self.root)}" for path in self.root.glob(pattern.lstrip("/"))]
        except OSError:
            return []
        return sorted(found, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)])

    def may_open(self, path: str) -> bool:
        """Whether this user may read and write a device node."""
        return os.access(self.root / path.lstrip("/"), os.R_OK | os.W_OK)

    def pci(self, vendor: str) -> list[PciDevice]:
        """The PCI functions of a vendor (`10de`)."""
        found = []
        for path in self.paths("/sys/bus/pci/devices/*"):
            if self.text(f"{path}/vendor").removeprefix("0x").lower() == vendor:
                device, kind = (self.text(f"{path}/{name}").removeprefix("0x").lower() for name in ("device", "class"))
                found.append(PciDevice(path.rpartition("/")[2], vendor, device, kind))
        return found

    def package(self, name: str) -> str:
        """The version of an installed distribution, or an empty string. Imports nothing."""
        if self.packages is not None:
            return self.packages.get(name, "")
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def has_module(self, name: str) -> bool:
        """Whether a top-level module could be imported. Imports nothing."""
        if self.modules is not None:
            return name in self.modules
        try:
            return importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            return False

    def torch_build(self) -> Mapping[str, str]:
        """What torch was built for, from its version.py, without importing it (that takes seconds): `version`, and
        `cuda`, `hip`, `xpu` with the toolkit's version where it was built for them. Empty where torch is absent."""
        if self.torch is not None:
            return self.torch
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return {}
        try:
            source = Path(spec.origin).with_name("version.py").read_text(errors="replace")
        except OSError:
            return {}
        return parse_torch_version(source)


def parse_torch_version(source: str) -> dict[str, str]:
    """The string assignments of torch/version.py; `__version__` as `version`."""
    pattern = r"^(__version__|cuda|hip|xpu)\s*(?::[^=\n]*)?=\s*['\"]([^'\"]+)['\"]"
    return {name.strip("_"): value for name, value in re.findall(pattern, source, re.MULTILINE)}


def visible(count: int, listed: str | None) -> list[int]:
    """The places that a variable such as HIP_VISIBLE_DEVICES leaves of `count` devices, in its order. None: all. As the
    vendors read it, the first entry that names no device hides itself and all that follow."""
    if listed is None:
        return list(range(count))
    places: list[int] = []
    for entry in listed.split(","):
        if not entry.strip().isdigit() or int(entry) >= count or int(entry) in places:
            break
        places.append(int(entry))
    return places
