"""A plugin that plays any hardware, so that a host without any covers the logic of all."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from qcore.discovery import Registry
from qcore.hookspecs import API_VERSION, hookimpl
from qcore.kernel import Accepts, Kernel
from qcore.method import Method
from qcore.platform import COLUMNS, Device, Platform
from qcore.support.evidence import Record, write_evidence

ANY = Accepts(("*",), zeros=(None, "stored", "float"), ordered=True, inputs=("*",))
REFERENCE = "qcore.kernels.reference:ReferenceLinear"


@dataclass
class Sim:
    """What the plugin declares; devices may be a function, to raise or to hang in."""

    name: str
    platforms: Sequence[Platform] = ()
    kernels: Sequence[Kernel] = ()
    methods: Sequence[Method] = ()
    devices: Sequence[Device] | Callable[[], Any] = ()
    records: Iterable[Record] = ()
    evidence: Path | None = None
    dist: Any = field(default=None)
    value: str = "sim"

    def load(self) -> ModuleType:
        """The plugin's module."""
        if self.evidence is not None and not self.evidence.exists():
            write_evidence(self.evidence, self.records)
        devices = self.devices
        hooks = {
            "qcore_platforms": lambda: list(self.platforms),
            "qcore_kernels": lambda: list(self.kernels),
            "qcore_methods": lambda: list(self.methods),
            "qcore_devices": devices if callable(devices) else (lambda: list(devices)),
            "qcore_evidence": lambda: self.evidence,
        }
        module = ModuleType(self.name)
        module.__dict__.update(
            {name: hookimpl(_named(hook, name)) for name, hook in hooks.items()}, QCORE_API=API_VERSION
        )
        return module


class Reader(Method):
    """A format that can be read, by name."""

    def __init__(self, name: str, *variants: str) -> None:
        self.name, self.variants = name, variants

    def plan(self, files: Any) -> Any:
        raise NotImplementedError

    def decode(self, files: Any, module: str) -> Any:
        raise NotImplementedError


def sim_registry(*plugins: Sim) -> Registry:
    """The core's own plugin and the simulated ones."""
    core = [e for e in importlib.metadata.entry_points(group="qcore.plugins") if e.name == "core"]
    return Registry([*core, *plugins])  # type: ignore[list-item]


def columns_of(plugin: str, *, portable: bool = False) -> list[Platform]:
    """The platforms that the core knows of a plugin."""
    return [Platform(c.id, c.title, portable=portable) for c in COLUMNS if c.plugin == plugin]


def kernel(name: str, *platforms: str, accepts: Accepts = ANY, **rest: Any) -> Kernel:
    """A row with the reference's implementation."""
    facts: dict[str, Any] = {"family": "sim", "op": "linear", "dtypes": ("bfloat16", "float32"), "cost": 1.0, **rest}
    return Kernel(name, platforms=platforms, accepts=accepts, implementation=REFERENCE, note="simulated", **facts)


def _named(hook: Callable[[], Any], name: str) -> Callable[[], Any]:
    def call() -> Any:
        return hook()

    call.__name__ = name
    return call
