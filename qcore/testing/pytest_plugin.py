"""pytest's side of the conformance suite: the option --qcore-fast, and a test for each kernel and scheme of a vendor.

It is loaded in every pytest run of an environment that has qcore, and so imports nothing of qcore until a suite is met.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from qcore.testing.capabilities import Capabilities


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qcore")
    group.addoption(
        "--qcore-fast",
        action="store_true",
        help="run qcore's conformance suite on the schemes of the support matrix only, not on all that kernels claim",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__module__ != "qcore.testing.suite" or "scheme" not in metafunc.fixturenames:
        return
    from qcore.testing.cases import catalogue, claimed, row_schemes

    vendor = _vendor(metafunc)
    schemes = row_schemes() if metafunc.config.getoption("--qcore-fast") else catalogue()
    cases = [(kernel, scheme) for kernel in vendor.kernels for scheme in claimed(kernel, schemes)]
    device = vendor.device
    if device is None:  # one test that says so, not hundreds
        skipped = pytest.mark.skip(f"no device of the plugin {vendor.plugin} on this host: no kernel was run")
        metafunc.parametrize(
            ("device", "kernel", "scheme"), [pytest.param(None, None, None, marks=skipped)], ids=["no-device"]
        )
        return
    metafunc.parametrize("device", [device], ids=[device.id], scope="session")
    metafunc.parametrize(("kernel", "scheme"), cases, ids=[f"{kernel.name}-{scheme}" for kernel, scheme in cases])


def _vendor(metafunc: pytest.Metafunc) -> Capabilities:
    """What the fixture `vendor` returns; it must be known before tests are made, and takes no arguments for that."""
    definitions = metafunc._arg2fixturedefs.get("vendor")
    if not definitions:
        raise pytest.UsageError(
            f"{metafunc.module.__name__}: qcore's conformance suite needs a fixture `vendor` that returns Capabilities"
        )
    return cast("Capabilities", definitions[-1].func())
