"""Finding plugins, one at a time, so that a broken one never harms the others.

pluggy's own load_setuptools_entrypoints is all or nothing: one ImportError leaves no plugin registered. Here every
entry point is loaded, and every hook of every plugin called, in isolation; what fails becomes a Refusal.

QCORE_PLUGINS=cpu,cuda restricts loading to the named plugins (the core's own is always there); QCORE_DISABLE=cuda
blocks some.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import pluggy

from qcore import hookspecs
from qcore.kernel import Kernel
from qcore.method import Method
from qcore.platform import Device, Platform
from qcore.refusal import Kind, Refusal

ENTRY_POINT_GROUP = "qcore.plugins"
CORE_PLUGIN = "core"

Status = Literal["loaded", "disabled", "incompatible", "broken"]


@dataclass
class Plugin:
    """One entry point and what became of it."""

    name: str
    distribution: str
    version: str
    status: Status = "loaded"
    api: tuple[int, int] | None = None
    refusal: Refusal | None = None
    platforms: list[Platform] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)

    def refuse(self, status: Status, code: str, kind: Kind, reason: str, fact: str, fix: str) -> None:
        """Takes everything that the plugin registered back and says why."""
        self.status = status
        self.refusal = Refusal(code, kind, f"plugin {self.name}", reason, fact, fix)
        self.platforms, self.kernels, self.methods = [], [], []


class Registry:
    """The loaded plugins and, by plugin, what they registered."""

    def __init__(self, entry_points: Iterable[importlib.metadata.EntryPoint]) -> None:
        self._manager = pluggy.PluginManager("qcore")
        self._manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        # The core first, then by name: an order that does not depend on what was installed last.
        for entry_point in sorted(entry_points, key=lambda e: (e.name != CORE_PLUGIN, e.name, e.value)):
            self.plugins.append(self._load(entry_point))
        for plugin in self.plugins:
            self._collect(plugin)

    @property
    def platforms(self) -> dict[str, Platform]:
        return {platform.id: platform for plugin in self.plugins for platform in plugin.platforms}

    @property
    def kernels(self) -> list[tuple[Kernel, str]]:
        """Every kernel with the name of its plugin."""
        return [(kernel, plugin.name) for plugin in self.plugins for kernel in plugin.kernels]

    @property
    def methods(self) -> list[Method]:
        return [method for plugin in self.plugins for method in plugin.methods]

    def devices(self) -> list[Device]:
        """The devices of this host, as every plugin sees them."""
        found: list[Device] = []
        for plugin in self.plugins:
            found += self._rows(plugin, "qcore_devices", Device)
        return found

    def reports(self) -> dict[str, dict[str, str]]:
        """What each plugin has to say to `qcore doctor`."""
        reports = {}
        for plugin in self.plugins:
            answer = self._call(plugin, "qcore_report")
            if isinstance(answer, Mapping):
                reports[plugin.name] = {str(key): str(value) for key, value in answer.items()}
        return reports

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> Plugin:
        distribution = entry_point.dist
        plugin = Plugin(
            entry_point.name,
            distribution.name if distribution else "",
            distribution.version if distribution else "",
        )
        if variable := _switched_off(plugin.name):
            plugin.refuse("disabled", "plugin-disabled", "usage", "it is switched off", variable, f"Unset {variable}.")
            return plugin
        if self._manager.has_plugin(plugin.name):
            self._broken(plugin, "another plugin has this name", entry_point.value)
            return plugin
        try:
            module = entry_point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may even exit while it is imported
            self._broken(plugin, "it failed while it was imported", _describe(error))
            return plugin
        plugin.api = _api_version(module)
        major, minor = hookspecs.API_VERSION
        if plugin.api is None or plugin.api[0] != major or plugin.api[1] > minor:
            wanted = "none stated" if plugin.api is None else f"{plugin.api[0]}.{plugin.api[1]}"
            plugin.refuse(
                "incompatible", "plugin-api", "missing-dep", "it was made for another plugin interface",
                f"found {wanted}, expected {major}.0 to {major}.{minor}",
                f"Upgrade {plugin.distribution or 'the plugin'} or qcore so that both speak interface {major}.",
            )  # fmt: skip
            return plugin
        try:
            self._manager.register(module, name=plugin.name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(plugin.name):
                self._manager.unregister(name=plugin.name)
            self._broken(plugin, "its hooks do not match the contract", _describe(error))
        return plugin

    def _collect(self, plugin: Plugin) -> None:
        plugin.platforms = self._rows(plugin, "qcore_platforms", Platform)
        plugin.kernels = self._rows(plugin, "qcore_kernels", Kernel)
        plugin.methods = self._rows(plugin, "qcore_methods", Method)
        for other in self.plugins[: self.plugins.index(plugin)]:
            twice = {k.name for k in plugin.kernels} & {k.name for k in other.kernels}
            twice |= {m.name for m in plugin.methods} & {m.name for m in other.methods}
            twice |= {p.id for p in plugin.platforms} & {p.id for p in other.platforms}
            if twice:
                self._broken(plugin, f"plugin {other.name} registered the same names", ", ".join(sorted(twice)))
                return

    def _rows(self, plugin: Plugin, hook: str, row: type[Any]) -> list[Any]:
        answer = self._call(plugin, hook)
        if plugin.status == "loaded" and not (isinstance(answer, Sequence) and all(isinstance(r, row) for r in answer)):
            self._broken(plugin, f"{hook} must return a sequence of {row.__name__}", repr(answer)[:200])
        return list(answer) if plugin.status == "loaded" else []

    def _call(self, plugin: Plugin, hook: str) -> Any:
        """The hook's answer from this plugin alone; () where it does not implement it or was refused."""
        if plugin.status != "loaded":
            return ()
        others = [other for name, other in self._manager.list_name_plugin() if name != plugin.name and other]
        try:
            answers = self._manager.subset_hook_caller(hook, others)()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._broken(plugin, f"{hook} failed", _describe(error))
            return ()
        return answers[0] if answers else ()

    def _broken(self, plugin: Plugin, reason: str, fact: str) -> None:
        where = plugin.distribution or f"plugin {plugin.name}"
        fix = f"Reinstall or upgrade {where}, or switch it off with QCORE_DISABLE={plugin.name}."
        plugin.refuse("broken", "plugin-broken", "missing-dep", reason, fact, fix)


@cache
def registry() -> Registry:
    """The plugins of this environment, loaded once."""
    return Registry(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


def _switched_off(name: str) -> str:
    """The environment variable that switches the plugin off, or an empty string."""
    if name == CORE_PLUGIN:
        return ""
    if name in _names("QCORE_DISABLE"):
        return "QCORE_DISABLE"
    wanted = os.environ.get("QCORE_PLUGINS")
    return "QCORE_PLUGINS" if wanted is not None and name not in _names("QCORE_PLUGINS") else ""


def _names(variable: str) -> set[str]:
    return {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}


def _api_version(module: object) -> tuple[int, int] | None:
    version = getattr(module, "QCORE_API", None)
    if isinstance(version, tuple) and len(version) == 2 and all(type(part) is int for part in version):
        return version
    return None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
