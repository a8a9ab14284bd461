"""Platform: a column of the matrix. Device: one that was found on this host."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qcore.refusal import Refusal, Refused


@dataclass(frozen=True)
class Target:
    """An architecture that kernels are compiled for where it is not. backend, name: what its compiler (of GPUs, Triton) calls it. Of GPUs alone: warp: threads of
    one. shared: bytes of shared memory that a block may have. matrix: Triton has the use of its matrix units. fp8: the 8-bit float
    with four bits of exponent that these multiply, `e4m3fn` or `e4m3fnuz`; empty: none. reserved: bytes of shared memory that the driver takes of
    every block besides, which the vendor's own tools count."""

    architecture: str
    backend: str
    name: int | str
    warp: int = 0
    shared: int = 0
    matrix: bool = True
    fp8: str = ""
    reserved: int = 0


@dataclass(frozen=True)
class Platform:
    """One column of the matrix, declared by the plugin that owns it (`qcore_platforms`).

    architectures: what the vendor tells its devices apart by, in its own words, from the oldest to the newest
    (`gfx90a`, `sm_86`); kernels name those that they run on. portable: torch's own operators run on its devices, so
    that the core's portable kernels do. targets: the architectures that `qcore verify --compile-only` compiles for.
    fast_dtype: as of a device, where only the platform is known.
    """

    id: str
    title: str
    architectures: tuple[str, ...] = ()
    portable: bool = False
    targets: tuple[Target, ...] = ()
    fast_dtype: str = "bfloat16"


@dataclass(frozen=True)
class Device:
    """One device of this host (`qcore_devices`).

    torch_device: what torch calls it ("cpu", "cuda:0"). architecture: one of its platform's, empty where the platform
    has none. features: instruction sets and capabilities, in the words that the plugin's kernels use in
    `Kernel.features`. memory: free bytes for weights, if known. fast_dtype: the floating dtype in which it runs models
    fastest without losing range. facts: what else a person wants to know of it. simulated: a stand-in for the hardware,
    never taken unless it is named. ready: `module:function`, which is called before anything is put on the device, where torch does not know it of itself.
    """

    id: str
    platform: str
    name: str
    torch_device: str
    architecture: str = ""
    features: frozenset[str] = frozenset()
    memory: int | None = None
    fast_dtype: str = "float32"
    facts: Mapping[str, str] = field(default_factory=dict)
    simulated: bool = False
    ready: str = ""

    def prepare(self) -> None:
        """Makes torch know the device."""
        if self.ready:
            module, _, name = self.ready.partition(":")
            getattr(importlib.import_module(module), name)()


@dataclass(frozen=True)
class Column:
    """A platform that the core knows by name, and the plugin that owns it, so that the answer for a platform whose plugin
    is absent can say what to install."""

    id: str
    title: str
    plugin: str


COLUMNS: tuple[Column, ...] = (
    Column("volta", "Volta", "cuda"),
    Column("turing", "Turing", "cuda"),
    Column("ampere", "Ampere", "cuda"),
    Column("ada", "Ada", "cuda"),
    Column("hopper", "Hopper", "cuda"),
    Column("amd", "AMD GPU", "rocm"),
    Column("xpu", "Intel GPU", "xpu"),
    Column("gaudi", "Intel Gaudi", "gaudi"),
    Column("x86_cpu", "x86 CPU", "cpu"),
    Column("neuron", "AWS Neuron", "neuron"),
    Column("tpu", "Google TPU", "tpu"),
    Column("blackwell", "Blackwell", "cuda"),
    Column("arm_cpu", "Arm CPU", "cpu"),
)
"""The matrix's columns in its order: the seed table's eleven, then ours. Plugins may bring further ones."""

PLATFORM_PLUGINS: dict[str, str] = {column.id: column.plugin for column in COLUMNS}
"""The plugin that owns each of them."""


def install_hint(plugin: str) -> str:
    """How to get the plugin of this name. Not every plugin is released yet, and the hint says so."""
    return f"pip install 'qcore[{plugin}]' (if that finds nothing, the plugin is not released yet)"


def known_platform(name: str, others: Iterable[str] = ()) -> str:
    """`name` if it is a column of the matrix, or one of `others`. Raises Refused (unknown-platform)."""
    known = list(dict.fromkeys([*PLATFORM_PLUGINS, *others]))
    if name in known:
        return name
    fix = f"Name one of: {', '.join(known)}."
    raise Refused(Refusal("unknown-platform", "usage", name, "no platform has this name", fix=fix))
