"""The conformance suite on what stands in for a TPU: Pallas's programs, interpreted on a CPU."""

import pytest

from qcore.kernel import Kernel
from qcore.platform import Device
from qcore.testing.capabilities import Capabilities
from qcore.testing.suite import *  # noqa: F403
from qcore_tpu.plugin import qcore_kernels, qcore_stand_ins


class Interpreted(Capabilities):
    @property
    def device(self) -> Device | None:
        (device,) = qcore_stand_ins()
        return device

    @property
    def kernels(self) -> list[Kernel]:
        """The plugin's own: that torch's operators run on a CPU shows nothing about TPUs."""
        return list(qcore_kernels())


@pytest.fixture(scope="session")
def vendor() -> Capabilities:
    return Interpreted("tpu")
