"""Calling the hooks: one plugin at a time, with types, and with every fault caught.

pluggy's calls are untyped and go to all plugins at once; here each hook is a method that asks one plugin and answers
with rows of the right type, or raises `HookFault`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pluggy

from qcore import hookspecs
from qcore.algorithm import Algorithm
from qcore.decoder import Decoder
from qcore.kernel import Kernel
from qcore.method import Method
from qcore.platform import Device, Platform

Row = TypeVar("Row")

HOST_SECONDS = 5.0
"""How long a plugin may look at the host; QCORE_HOST_SECONDS sets another limit."""


class HookFault(Exception):
    """What a plugin did wrong: reason, and the fact that shows it."""

    def __init__(self, reason: str, fact: str) -> None:
        super().__init__(f"{reason}: {fact}")
        self.reason, self.fact = reason, fact


class Hooks:
    """The registered plugins, by name."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("qcore")
        self._manager.add_hookspecs(hookspecs)

    def register(self, name: str, module: object) -> None:
        """Raises HookFault where the module's hooks do not match the contract."""
        try:
            self._manager.register(module, name=name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            raise HookFault("its hooks do not match the contract", describe(error)) from error

    def has(self, name: str) -> bool:
        """Whether a plugin of this name is registered."""
        return self._manager.has_plugin(name)

    def platforms(self, plugin: str) -> list[Platform]:
        return self._rows(plugin, "qcore_platforms", Platform)

    def kernels(self, plugin: str) -> list[Kernel]:
        return self._rows(plugin, "qcore_kernels", Kernel)

    def methods(self, plugin: str) -> list[Method]:
        return self._rows(plugin, "qcore_methods", Method)  # type: ignore[type-abstract]

    def algorithms(self, plugin: str) -> list[Algorithm]:
        return self._rows(plugin, "qcore_algorithms", Algorithm)

    def decoders(self, plugin: str) -> list[Decoder]:
        return self._rows(plugin, "qcore_decoders", Decoder)

    def evidence(self, plugin: str) -> Path | None:
        """Where the plugin's evidence.json is or will be; None where it has none."""
        answer = self._call(plugin, "qcore_evidence")
        if not isinstance(answer, Path | None):
            raise HookFault("qcore_evidence must return a pathlib.Path", repr(answer)[:200])
        return answer

    def devices(self, plugin: str) -> Callable[[], list[Device]]:
        """Begins to look for the plugin's devices; the function that is returned waits for them."""
        return self._timed(plugin, "qcore_devices", lambda: self._rows(plugin, "qcore_devices", Device))

    def stand_ins(self, plugin: str) -> list[Device] | None:
        """None where the plugin does not implement the hook."""
        if all(found.plugin_name != plugin for found in self._manager.hook.qcore_stand_ins.get_hookimpls()):
            return None
        return self._rows(plugin, "qcore_stand_ins", Device)

    def report(self, plugin: str) -> Callable[[], dict[str, str]]:
        """Begins to ask for the plugin's report; the function that is returned waits for it."""

        def ask() -> dict[str, str]:
            answer = self._call(plugin, "qcore_report")
            if not isinstance(answer, Mapping | None):
                raise HookFault("qcore_report must return a mapping", repr(answer)[:200])
            return {str(key): str(value) for key, value in (answer or {}).items()}

        return self._timed(plugin, "qcore_report", ask)

    def _rows(self, plugin: str, hook: str, row: type[Row]) -> list[Row]:
        answer = self._call(plugin, hook)
        if answer is None:
            return []
        if not isinstance(answer, Sequence) or not all(isinstance(found, row) for found in answer):
            raise HookFault(f"{hook} must return a sequence of {row.__name__}", repr(answer)[:200])
        return list(answer)

    def _call(self, plugin: str, hook: str) -> Any:
        """The hook's answer from this plugin alone; None where it does not implement the hook."""
        others = [other for name, other in self._manager.list_name_plugin() if name != plugin and other]
        try:
            answers = self._manager.subset_hook_caller(hook, others)()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may even exit
            raise HookFault(f"{hook} failed", describe(error)) from error
        return answers[0] if answers else None

    def _timed(self, plugin: str, hook: str, ask: Callable[[], Row]) -> Callable[[], Row]:
        """A driver that hangs must hang neither us nor the other plugins: the hook runs in a thread that is left behind
        when its time is over, and that does not keep the process alive."""
        answers: list[Row | HookFault] = []

        def run() -> None:
            try:
                answers.append(ask())
            except HookFault as fault:
                answers.append(fault)

        thread = threading.Thread(target=run, name=f"{plugin}.{hook}", daemon=True)
        thread.start()

        def wait() -> Row:
            limit = _seconds()
            thread.join(limit)
            if not answers:
                raise HookFault(f"{hook} did not answer", f"waited {limit:g} s; QCORE_HOST_SECONDS sets another limit")
            if isinstance(answers[0], HookFault):
                raise answers[0]
            return answers[0]

        return wait


def describe(error: BaseException) -> str:
    """The error's type and message, cut to 500 characters."""
    return f"{type(error).__name__}: {error}"[:500]


def _seconds() -> float:
    try:
        return max(0.1, float(os.environ.get("QCORE_HOST_SECONDS", HOST_SECONDS)))
    except ValueError:
        return HOST_SECONDS
