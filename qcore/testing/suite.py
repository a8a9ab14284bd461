"""The tests that a vendor's test file imports with a star: `from qcore.testing.suite import *`.

They need one fixture, `vendor`, which returns a qcore.testing.capabilities.Capabilities. pytest's plugin `qcore`
(qcore.testing.pytest_plugin) makes one test of each kernel and scheme.
"""

from __future__ import annotations

import time
from fnmatch import fnmatchcase

import pytest

from qcore.discovery import registry
from qcore.kernel import Kernel
from qcore.kernels.stacking import StackableLinear
from qcore.platform import PLATFORM_PLUGINS, Device
from qcore.refusal import Refusal
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.support.evidence import read_evidence
from qcore.testing.capabilities import Capabilities
from qcore.testing.cases import catalogue
from qcore.testing.checks import CHECKS, SIZES, Bench, smallest_shape
from qcore.testing.verify import applies, unable

__all__ = [
    "test_devices_are_found_in_time",
    "test_evidence_can_be_read",
    "test_facts_are_complete",
    "test_kernel_against_the_definition",
    "test_other_schemes_are_refused_with_a_reason",
    "test_plugin_is_loaded",
]

DEVICE_SECONDS = 1.0
"""How long a plugin may take to look for its devices."""


def test_plugin_is_loaded(vendor: Capabilities) -> None:
    """The plugin is installed, and nothing about it was refused."""
    found = {plugin.name: plugin for plugin in registry().plugins}
    assert vendor.plugin in found, (
        f"no entry point of the group qcore.plugins is named {vendor.plugin!r}: {sorted(found)}"
    )
    plugin = found[vendor.plugin]
    assert plugin.status == "loaded", str(plugin.refusal)
    assert plugin.platforms or plugin.kernels or plugin.methods or plugin.algorithms, "it registers nothing"


def test_facts_are_complete(vendor: Capabilities) -> None:
    """Platforms are the plugin's own; kernels name platforms that exist, say what they do and can be imported."""
    known = set(registry().platforms) | set(PLATFORM_PLUGINS)
    for platform in vendor.platforms:
        owner = PLATFORM_PLUGINS.get(platform, vendor.plugin)
        assert owner == vendor.plugin, f"platform {platform} belongs to the plugin {owner}"
    for kernel in vendor.kernels:
        assert set(kernel.platforms) <= known, f"{kernel.name} names unknown platforms {kernel.platforms}"
        assert kernel.note, f"{kernel.name} has no note: one sentence on what it does"
        assert kernel.cost > 0 and kernel.dtypes and min(kernel.multiples) > 0, f"{kernel.name}: {kernel}"
        if vendor.device is not None:
            implementation = kernel.load()
            assert callable(implementation.from_layer), f"{kernel.implementation} has no from_layer"
            assert kernel.experts == issubclass(implementation, StackableLinear), (
                f"{kernel.name}: experts, says its row"
            )


def test_devices_are_found_in_time(vendor: Capabilities) -> None:
    """Looking at the host takes well under a second, and finds devices of the plugin's own platforms."""
    registry().devices()  # what is imported once is not counted
    began = time.perf_counter()
    found = [device for device in registry().devices() if device.platform in vendor.platforms]
    assert time.perf_counter() - began < DEVICE_SECONDS
    platforms = registry().platforms
    for device in found:
        known = platforms[device.platform].architectures
        assert not known or device.architecture in ("", *known), (
            f"{device.id}: {device.architecture!r} is none of {known}"
        )


def test_evidence_can_be_read(vendor: Capabilities) -> None:
    """evidence.json is well formed, and speaks of the plugin's own platforms and of kernels that exist."""
    plugin = next(plugin for plugin in registry().plugins if plugin.name == vendor.plugin)
    names = {kernel.name for kernel, _ in registry().kernels}
    for record in read_evidence(plugin.evidence) if plugin.evidence else []:
        assert record.platform in vendor.platforms and record.kernel in names, record


def test_other_schemes_are_refused_with_a_reason(vendor: Capabilities) -> None:
    """Every scheme of the catalogue that a row does not take is refused with what was found and what is taken."""
    device = vendor.device
    for kernel in vendor.kernels:
        if device is None or device.platform not in kernel.platforms:
            platform = next(iter(vendor.platforms & set(kernel.platforms)), "")
        else:
            platform = device.platform
        for scheme in catalogue():
            request = LayerRequest(kernel.op, scheme, smallest_shape(kernel, scheme), kernel.dtypes[0], exact=False)
            refusal = select(request, platform, [(kernel, vendor.plugin)]).candidates[0].refusal
            if kernel.accepts.refuse(scheme) is None:
                assert refusal is None or refusal.code != "scheme-unsupported", f"{kernel.name}, {scheme}: {refusal}"
            else:
                assert refusal is not None, f"{kernel.name} takes {scheme}, which its row does not claim"
                _is_explained(refusal)


def test_kernel_against_the_definition(vendor: Capabilities, device: Device, kernel: Kernel, scheme: Scheme) -> None:
    """One kernel and scheme: every check, in every data type and size."""
    if refusal := unable(kernel, scheme, device):
        pytest.skip(f"{device.name}: {refusal.reason}: {refusal.fact}")
    device.prepare()
    for dtype in kernel.dtypes:
        for size in SIZES:
            bench = Bench(kernel, scheme, dtype, size, device)
            for name in CHECKS:
                if applies(name, kernel, size):
                    _expect(vendor, bench, name)


def _expect(vendor: Capabilities, bench: Bench, check: str) -> None:
    """Runs the check and holds its outcome against what the vendor declares."""
    place = f"{bench.kernel.name} {bench.scheme} {check}"
    known = next((why for pattern, why in vendor.known_failures.items() if fnmatchcase(place, pattern)), None)
    able = bool(getattr(vendor, check))
    try:
        CHECKS[check](bench)
    except Exception as fault:
        if able and known is None:
            if isinstance(fault, AssertionError):
                raise
            raise AssertionError(f"{bench}: {check}: {type(fault).__name__}: {fault}") from fault
        return
    if not able or known is not None:
        declared = f"capability {check} is declared missing" if not able else f"a known failure ({known})"
        raise AssertionError(f"{bench}: {check} passes, but {declared}: take the declaration back")


def _is_explained(refusal: Refusal) -> None:
    assert refusal.reason and refusal.fact and refusal.fix, f"a refusal without reason, fact or fix: {refusal}"
