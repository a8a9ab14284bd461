"""The conformance suite on this host's Intel GPUs; without one, what can be checked without."""

import pytest

from qcore.testing.capabilities import Capabilities
from qcore.testing.suite import *  # noqa: F403


@pytest.fixture(scope="session")
def vendor() -> Capabilities:
    return Capabilities("xpu")
