"""What a vendor says of its kernels to the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping

from qcore.discovery import registry
from qcore.kernel import Kernel
from qcore.platform import Device


class Capabilities:
    """A plugin under test. Every property has a default that holds for a complete implementation: override only what
    differs. What is declared missing must really fail: a check that passes against its declaration fails the suite, so
    that no declaration outlives its reason.

    plugin: its name among the entry points of the group `qcore.plugins`.
    """

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin

    @property
    def device(self) -> Device | None:
        """The device to run on: the first that the plugin finds on this host. None: kernels are not run."""
        own = self.platforms
        return next((device for device in registry().devices() if device.platform in own), None)

    @property
    def numbers(self) -> bool:
        """Products of every batch size are within the bounds of qcore.accuracy."""
        return True

    @property
    def largest_codes(self) -> bool:
        """Sums of the largest products do not overflow."""
        return True

    @property
    def leading_dimensions(self) -> bool:
        """Inputs may have any number of leading dimensions, none included."""
        return True

    @property
    def strided_input(self) -> bool:
        """Inputs need not be contiguous."""
        return True

    @property
    def empty_input(self) -> bool:
        """An input without rows gives an output without rows."""
        return True

    @property
    def bias_and_multiplier(self) -> bool:
        """Kernels work inside QuantizedLinear and QuantizedEmbedding."""
        return True

    @property
    def packed_size(self) -> bool:
        """The prepacked weight takes no more than 1.5 times the canonical one."""
        return True

    @property
    def attention(self) -> bool:
        """Attention that reads a kv cache's rows gives what it gives to the dequantized ones."""
        return True

    @property
    def stacked_experts(self) -> bool:
        """Kernels that hold a mixture's experts as one give each row what its own expert gives."""
        return True

    @property
    def known_failures(self) -> Mapping[str, str]:
        """Single faults that are known: shell patterns over `kernel scheme check`, and why each is there."""
        return {}

    @property
    def platforms(self) -> frozenset[str]:
        """The platforms that the plugin declares."""
        return frozenset(p.id for plugin in registry().plugins if plugin.name == self.plugin for p in plugin.platforms)

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels to test: the plugin's own, and the portable ones that run on its platforms."""
        own = self.platforms
        return [kernel for kernel, plugin in registry().kernels if plugin == self.plugin or own & set(kernel.platforms)]
