"""The conformance suite through torch-xla: its graphs, in which Pallas's programs are interpreted, compiled for a CPU by XLA (PJRT)."""

import pytest

from qcore.kernel import Kernel
from qcore.platform import Device
from qcore.testing.capabilities import Capabilities
from qcore.testing.suite import *  # noqa: F403
from qcore_tpu.plugin import qcore_kernels, qcore_stand_ins


class Lazy(Capabilities):
    @property
    def device(self) -> Device | None:
        (device,) = qcore_stand_ins()
        assert device.torch_device == "xla", device
        return device

    @property
    def kernels(self) -> list[Kernel]:
        """The plugin's own."""
        return list(qcore_kernels())


@pytest.fixture(scope="session")
def vendor() -> Capabilities:
    return Lazy("tpu")
