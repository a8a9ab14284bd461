"""What is installed and what is on this host, as lists."""

from __future__ import annotations

from qcore.discovery import Plugin, registry
from qcore.platform import Device


def plugins() -> list[Plugin]:
    """Every plugin that an entry point names, with its status and, where it was refused, why."""
    return list(registry().plugins)


def devices() -> list[Device]:
    """The devices that the loaded plugins found on this host."""
    return registry().devices()
