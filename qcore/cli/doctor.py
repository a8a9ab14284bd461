"""qcore doctor: what this host has, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from qcore.cli import options
from qcore.cli.output import print_json, print_table

_LIBRARIES = ("qcore", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def doctor(json: options.Json = False) -> None:
    """Show versions, the devices found, and for every other platform what is missing.

    Example: qcore doctor
    """
    document = examine()
    if json:
        print_json(document)
        return
    print_table(("library", "version"), document["versions"].items())
    print()
    for device in document["devices"]:
        memory = f", {device['memory_mib']:,.0f} MiB free" if device["memory_mib"] else ""
        print(
            f"device {device['id']}: {device['name']} ({device['platform']}{memory}, runs fastest in {device['fast_dtype']})"
        )
    if not document["devices"]:
        print("no device: install a plugin, such as pip install 'qcore[cpu]'")
    print()
    print_table(
        ("platform", "missing", "fix"), ((row["platform"], row["missing"], row["fix"]) for row in document["missing"])
    )
    for name, report in document["reports"].items():
        print(f"\nplugin {name}")
        for key, value in report.items():
            print(f"  {key}: {value}")


def examine() -> dict[str, Any]:
    """The command's JSON document."""
    from qcore.discovery import registry
    from qcore.platform import PLATFORM_PLUGINS

    plugins = registry()
    devices = plugins.devices()
    reports = plugins.reports()
    present = {device.platform for device in devices}
    missing = []
    for name, owner in PLATFORM_PLUGINS.items():
        if name in present:
            continue
        if absent := plugins.absent(name):
            row = (absent.reason, absent.fix)
        else:
            report = reports.get(owner, {})
            row = (
                report.get("missing", "no such device on this host"),
                report.get("fix", "run on a host that has one"),
            )
        missing.append({"platform": name, "plugin": owner, "missing": row[0], "fix": row[1]})
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
        "devices": [
            {
                "id": device.id,
                "platform": device.platform,
                "name": device.name,
                "features": sorted(device.features),
                "memory_mib": round(device.memory / 2**20, 1) if device.memory is not None else None,
                "fast_dtype": device.fast_dtype,
            }
            for device in devices
        ],
        "missing": missing,
        "plugins": {plugin.name: plugin.status for plugin in plugins.plugins},
        "reports": reports,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
