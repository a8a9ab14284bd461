"""The contract between qcore and its plugins.

A plugin is a module that an entry point of the group `qcore.plugins` names. It implements any of the hooks below with
`qcore.hookimpl` and states the interface version that it was written for as `QCORE_API = (major, minor)`: the core takes
plugins of its own major version and of no later minor one. New hooks and new arguments raise the minor version; anything
that breaks a plugin raises the major one.

Facts hooks are asked without the hardware and without the vendor's SDK, and must import neither. Every hook of every
plugin is called on its own: one that raises, exits or returns something else is reported by `qcore plugins`, and the
others go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from qcore.algorithm import Algorithm
    from qcore.decoder import Decoder
    from qcore.kernel import Kernel
    from qcore.method import Method
    from qcore.platform import Device, Platform

API_VERSION = (1, 5)
"""Version of this contract."""

hookspec = pluggy.HookspecMarker("qcore")
hookimpl = pluggy.HookimplMarker("qcore")

# --- Facts: asked once, on any machine ------------------------------------------------------------------------------


@hookspec
def qcore_platforms() -> Sequence[Platform]:  # type: ignore[empty-body]
    """The columns of the matrix that this plugin owns. Their `targets` since 1.2."""


@hookspec
def qcore_kernels() -> Sequence[Kernel]:  # type: ignore[empty-body]
    """The kernels that this plugin brings, as rows. `Kernel.experts` since 1.3, `Kernel.optional` since 1.5."""


@hookspec
def qcore_methods() -> Sequence[Method]:  # type: ignore[empty-body]
    """The checkpoint formats that this plugin reads."""


@hookspec
def qcore_algorithms() -> Sequence[Algorithm]:  # type: ignore[empty-body]
    """The ways of making quantized weights that this plugin brings, as rows."""


@hookspec
def qcore_decoders() -> Sequence[Decoder]:  # type: ignore[empty-body]
    """The ways of reading a text through a whole model that this plugin brings, as rows. Since 1.1."""


@hookspec
def qcore_evidence() -> Path:  # type: ignore[empty-body]
    """The plugin's evidence.json: what was proved of its cells of the matrix. `qcore verify --record` writes it."""


# --- Host: asked when a device is wanted -----------------------------------------------------------------------------


@hookspec
def qcore_devices() -> Sequence[Device]:  # type: ignore[empty-body]
    """The devices of this host, in well under a second, best first; an empty list where there is none."""


@hookspec
def qcore_stand_ins() -> Sequence[Device]:  # type: ignore[empty-body]
    """Devices, marked as simulated, that stand in for the plugin's hardware where it is not: what they run on is made ready now. Only `qcore verify
    --simulate` asks. Since 1.2."""


# --- Report: asked by `qcore doctor` ---------------------------------------------------------------------------------


@hookspec
def qcore_report() -> Mapping[str, str]:  # type: ignore[empty-body]
    """What a person who looks for a fault wants to know: versions, what is missing and how to get it."""
