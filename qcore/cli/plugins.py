"""qcore plugins: every plugin that is installed, and what became of it."""

from __future__ import annotations

from qcore.cli import options
from qcore.cli.output import print_json, print_table


def plugins_command(json: options.Json = False) -> None:
    """List the installed plugins, what they bring, and why any of them was refused.

    Example: qcore plugins --json
    """
    from qcore.inventory import devices, plugins

    devices()  # a plugin that fails when it is asked for its devices is broken too
    found = plugins()
    if json:
        print_json(
            [
                {
                    "name": plugin.name,
                    "distribution": plugin.distribution,
                    "version": plugin.version,
                    "api": list(plugin.api) if plugin.api else None,
                    "status": plugin.status,
                    "platforms": [platform.id for platform in plugin.platforms],
                    "kernels": [kernel.name for kernel in plugin.kernels],
                    "methods": [method.name for method in plugin.methods],
                    "refusal": plugin.refusal.to_dict() if plugin.refusal else None,
                }
                for plugin in found
            ]
        )
        return
    print_table(
        ("plugin", "distribution", "status", "platforms", "kernels", "formats"),
        (
            (
                plugin.name,
                f"{plugin.distribution} {plugin.version}",
                plugin.status,
                ", ".join(platform.id for platform in plugin.platforms) or "-",
                len(plugin.kernels),
                ", ".join(method.name for method in plugin.methods) or "-",
            )
            for plugin in found
        ),
    )
    for plugin in found:
        if plugin.refusal:
            print(f"\n{plugin.refusal}")
