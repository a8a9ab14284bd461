"""The conformance suite on this host's NVIDIA GPUs; without one, what can be checked without."""

import pytest

from qcore.testing.capabilities import Capabilities
from qcore.testing.suite import *  # noqa: F403


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are taken only where they are quicker are judged all the same."""
    monkeypatch.setenv("QCORE_BITBLAS", "always")


@pytest.fixture(scope="session")
def vendor() -> Capabilities:
    return Capabilities("cuda")
