"""Finding plugins, one at a time, so that a broken one never harms the others.

pluggy's own load_setuptools_entrypoints is all or nothing: one ImportError leaves no plugin registered. Here every
entry point is loaded, and every hook of every plugin called, in isolation; what fails becomes a Refusal.

QCORE_PLUGINS=cpu,cuda restricts loading to the named plugins (the core's own is always there); QCORE_DISABLE=cuda
blocks some.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from qcore import hookspecs
from qcore.algorithm import Algorithm
from qcore.decoder import Decoder
from qcore.hooks import HookFault, Hooks, describe
from qcore.kernel import Kernel
from qcore.method import Method
from qcore.platform import PLATFORM_PLUGINS, Device, Platform, install_hint
from qcore.refusal import Kind, Refusal

ENTRY_POINT_GROUP = "qcore.plugins"
CORE_PLUGIN = "core"

Answer = TypeVar("Answer")
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
    algorithms: list[Algorithm] = field(default_factory=list)
    decoders: list[Decoder] = field(default_factory=list)
    evidence: Path | None = None

    @property
    def names(self) -> list[str]:
        """Every name that it registers, with its kind."""
        return [
            *(f"platform {platform.id}" for platform in self.platforms),
            *(f"kernel {kernel.name}" for kernel in self.kernels),
            *(f"method {method.name}" for method in self.methods),
            *(f"algorithm {algorithm.name}" for algorithm in self.algorithms),
            *(f"decoder {decoder.name}" for decoder in self.decoders),
        ]

    def refuse(self, status: Status, code: str, kind: Kind, reason: str, fact: str, fix: str) -> None:
        """Takes everything that the plugin registered back and says why."""
        self.status = status
        self.refusal = Refusal(code, kind, f"plugin {self.name}", reason, fact, fix)
        self.platforms, self.kernels, self.methods, self.algorithms, self.decoders = [], [], [], [], []
        self.evidence = None


class Registry:
    """The loaded plugins and, by plugin, what they registered."""

    def __init__(self, entry_points: Iterable[importlib.metadata.EntryPoint]) -> None:
        self._hooks = Hooks()
        self.plugins: list[Plugin] = []
        for entry_point in sorted(entry_points, key=_rank):
            self.plugins.append(self._load(entry_point))
        for plugin in self.plugins:
            self._collect(plugin)

    @property
    def platforms(self) -> dict[str, Platform]:
        return {platform.id: platform for plugin in self.plugins for platform in plugin.platforms}

    @property
    def kernels(self) -> list[tuple[Kernel, str]]:
        """Every kernel with the name of its plugin; portable ones name the platforms that run torch's own operators."""
        portable = tuple(platform.id for platform in self.platforms.values() if platform.portable)
        return [
            (replace(kernel, platforms=portable) if kernel.platforms == ("*",) else kernel, plugin.name)
            for plugin in self.plugins
            for kernel in plugin.kernels
        ]

    @property
    def methods(self) -> list[Method]:
        return [method for plugin in self.plugins for method in plugin.methods]

    @property
    def algorithms(self) -> list[Algorithm]:
        return [algorithm for plugin in self.plugins for algorithm in plugin.algorithms]

    @property
    def decoders(self) -> list[Decoder]:
        return [decoder for plugin in self.plugins for decoder in plugin.decoders]

    def absent(self, platform: str) -> Refusal | None:
        """Why no loaded plugin declares the platform, and what to do; None where one does."""
        if platform in self.platforms:
            return None
        owner = PLATFORM_PLUGINS.get(platform, platform)
        refused = next((p.refusal for p in self.plugins if p.name == owner and p.refusal), None)
        if refused is not None:
            return replace(refused, subject=f"platform {platform}, plugin {owner}")
        return Refusal("plugin-missing", "missing-dep", f"platform {platform}", "the plugin that owns it is not installed",
                       f"found no plugin {owner}", install_hint(owner))  # fmt: skip

    def devices(self) -> list[Device]:
        """The devices of this host, as every plugin sees them; the plugins look at the same time."""
        return [device for found in self._ask(self._hooks.devices).values() for device in found]

    def stand_ins(self, plugin: str) -> list[Device] | None:
        """What plays this plugin's hardware here; None where nothing ever does. Raises HookFault where the plugin fails."""
        return self._hooks.stand_ins(plugin)

    def reports(self) -> dict[str, dict[str, str]]:
        """What each plugin has to say to `qcore doctor`."""
        return {name: report for name, report in self._ask(self._hooks.report).items() if report}

    def _ask(self, hook: Callable[[str], Callable[[], Answer]]) -> dict[str, Answer]:
        """Every loaded plugin's answer to a host hook."""
        begun = [(plugin, hook(plugin.name)) for plugin in self.plugins if plugin.status == "loaded"]
        answers = {}
        for plugin, wait in begun:
            try:
                answers[plugin.name] = wait()
            except HookFault as fault:
                self._broken(plugin, fault.reason, fault.fact)
        return answers

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
        if self._hooks.has(plugin.name):
            self._broken(plugin, "another plugin has this name", entry_point.value)
            return plugin
        try:
            module = entry_point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may even exit while it is imported
            self._broken(plugin, "it failed while it was imported", describe(error))
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
            self._hooks.register(plugin.name, module)
        except HookFault as fault:
            self._broken(plugin, fault.reason, fault.fact)
        return plugin

    def _collect(self, plugin: Plugin) -> None:
        """Asks for the facts, and refuses a plugin whose names another one has."""
        if plugin.status != "loaded":
            return
        ask = self._hooks
        try:
            plugin.platforms, plugin.kernels = ask.platforms(plugin.name), ask.kernels(plugin.name)
            plugin.methods, plugin.algorithms = ask.methods(plugin.name), ask.algorithms(plugin.name)
            plugin.decoders = ask.decoders(plugin.name)
            plugin.evidence = ask.evidence(plugin.name)
        except HookFault as fault:
            self._broken(plugin, fault.reason, fault.fact)
            return
        for platform in plugin.platforms:
            owner = PLATFORM_PLUGINS.get(platform.id, plugin.name)
            if owner != plugin.name:
                self._broken(plugin, f"platform {platform.id} belongs to the plugin {owner}", repr(platform))
                return
        others = self.plugins[: self.plugins.index(plugin)]
        twice = _repeated(plugin.names) | (set(plugin.names) & {name for other in others for name in other.names})
        if twice:
            owner = next((f"plugin {other.name}" for other in others if twice & set(other.names)), "it")
            self._broken(plugin, f"{owner} registered the same names already", ", ".join(sorted(twice)))

    def _broken(self, plugin: Plugin, reason: str, fact: str) -> None:
        where = plugin.distribution or f"plugin {plugin.name}"
        fix = f"Reinstall or upgrade {where}, or switch it off with QCORE_DISABLE={plugin.name}."
        plugin.refuse("broken", "plugin-broken", "missing-dep", reason, fact, fix)


@cache
def registry() -> Registry:
    """The plugins of this environment, loaded once."""
    return Registry(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


def _rank(entry_point: importlib.metadata.EntryPoint) -> tuple[bool, bool, str, bool, str]:
    """The order of loading, which decides who keeps a name that two claim: the core, the plugins that the core knows, from
    their own distributions, then all others by name. It does not depend on what was installed last."""
    name, distribution = entry_point.name, entry_point.dist
    known = name in PLATFORM_PLUGINS.values()
    stranger = distribution is None or distribution.name != f"qcore-{name}"
    return name != CORE_PLUGIN, not known, name, stranger, entry_point.value


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


def _repeated(names: Sequence[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}
